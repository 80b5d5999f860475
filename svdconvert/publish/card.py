"""The card of a repository: what it is and is not, how to load it, how it was made."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

from svdconvert.hub.auth import endpoint
from svdconvert.layouts.loading import CAUSAL, auto_class
from svdconvert.manifest.schema import Manifest
from svdconvert.publish.files import SourceRepos

_LICENCE = ("license", "license_name", "license_link")
_STAMP = re.compile(r"\n<!-- written by svdconvert ([0-9a-f]{16}) -->\n$")
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CardContext:
    """What a card says, beside the manifest."""

    repository: str
    revision: str | None
    repos: SourceRepos
    config: Mapping[str, Any]
    """Of the model, empty for an adapter alone."""
    adapter: Mapping[str, Any]
    """Configuration of the adapter, initial or trained; empty where there is none."""
    licence: Mapping[str, Any]
    """The front matter's words for the base's licence."""
    command: str
    """What made it."""
    metrics: Path | None = None
    absent: tuple[str, ...] = ()
    """Files of code that the configuration names and the repository does not have."""


def write_card(manifest: Manifest, context: CardContext) -> str:
    """README.md with its front matter, and a stamp by which an edited one is told."""
    kind = _Adapter(manifest, context) if _is_adapter(manifest, context) else _Weights(manifest, context)
    front = yaml.safe_dump(kind.front() | dict(context.licence), sort_keys=False, allow_unicode=True)
    code = kind.loading()
    parts = [
        f"---\n{front}---\n",
        f"# {context.repository.split('/')[-1]}\n",
        kind.what() + "\n",
        "## Load it\n",
        code + "\n",
        "## What is known about it\n",
        _table(_numbers(manifest, context)) + "\n",
        "## How it was made\n",
        f"```\n{context.command}\n```\n",
        f"svdconvert {manifest.svdconvert} wrote this repository; `svdconvert.json` holds every option, "
        "singular values and errors by matrix, and a checksum of every tensor, which "
        f"`svdconvert verify {context.repository}` compares.\n",
    ]
    return stamped("\n".join(parts))


def stamped(text: str) -> str:
    """The text with a checksum of itself at its end."""
    return f"{text}\n<!-- written by svdconvert {xxhash.xxh3_64_hexdigest(text.encode())} -->\n"


def is_untouched(card: str) -> bool:
    """True for a card that `write_card` wrote and nobody has edited."""
    found = _STAMP.search(card)
    return found is not None and stamped(card[: found.start()]) == card


def licence_of(card: str) -> dict[str, Any]:
    """The licence that a card's front matter states, in its own words."""
    found = _FRONT.match(card)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return {key: front[key] for key in _LICENCE if key in front} if isinstance(front, dict) else {}


def _is_adapter(manifest: Manifest, context: CardContext) -> bool:
    """True where the repository's own weights are an adapter's."""
    return bool(context.adapter) and not (manifest.kind == "decomposed" and manifest.checksums)


@dataclass(frozen=True)
class _Weights:
    """A repository with the weights of a whole model: a residual base, or a plain checkpoint."""

    manifest: Manifest
    context: CardContext

    @property
    def _plain(self) -> bool:
        return self.manifest.kind != "decomposed"

    def front(self) -> dict[str, Any]:
        plain = self._plain
        relation = {} if self.manifest.kind == "converted" else {"base_model_relation": "finetune"}
        tag = _TASKS.get(auto_class(self.context.config))
        task = {"pipeline_tag": tag} if plain and tag else {}
        return {
            **_base_model(self.context.repos.base_id, relation),
            **({"library_name": "transformers"} if self.context.config else {}),
            **task,
            "tags": _tags(self.manifest, "residual-base" if self.manifest.rebased else self.manifest.kind),
        }

    def what(self) -> str:
        base, kind = _named(self.context.repos.base_id, "its base"), self.manifest.kind
        if kind == "converted":
            return f"{base} under the names of the layout `{self.manifest.layout}`: the same weights."
        if kind == "merged":
            return (
                f"A plain checkpoint: {base} with a {self.manifest.method} adapter merged into its weights."
            )
        if kind == "trained":
            return f"A plain checkpoint: {base}, all of whose chosen matrices were trained."
        if not self.manifest.rebased:
            return f"A copy of {base}, and an initial adapter for it in `{_folder(self.manifest)}`."
        return (
            f"The residual base of {base}, and in `{_folder(self.manifest)}` the initial "
            f"{self.manifest.method} adapter that belongs to it.\n\n"
            f"**Not a model to be used by itself.** {len(self.manifest.matrices)} matrices of the base are "
            "split as W = W_res + s B A; the weights here hold W_res in their place, and the adapter holds B "
            "and A. Together they give what the base gives; the residual alone does not."
        )

    def loading(self) -> str:
        repository = f'"{self.context.repository}"{_at(self.context.revision)}'
        if not self._plain:
            return _residual_code(self.manifest, self.context, repository)
        if not self.context.config:
            return _rwkv_code(self.manifest, self.context)
        name = auto_class(self.context.config)
        trust = ", trust_remote_code=True" if "auto_map" in self.context.config else ""
        code = _python(
            f"from transformers import AutoTokenizer, {name}\n\n"
            f"model = {name}.from_pretrained({repository}{trust})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({repository}{trust})"
        )
        if not self.context.absent:
            return code
        return f"Put {' and '.join(self.context.absent)} of a released model beside the weights.\n\n{code}"


@dataclass(frozen=True)
class _Adapter:
    """A repository with an adapter: initial, trained, or a plain LoRA."""

    manifest: Manifest
    context: CardContext

    @property
    def _weights_id(self) -> str | None:
        """The repository that the adapter is loaded on."""
        return self.context.repos.residual_id if self._on_residual else self.context.repos.base_id

    @property
    def _on_residual(self) -> bool:
        return self.manifest.rebased and self.manifest.kind == "trained"

    @property
    def _has_head(self) -> bool:
        return self.context.adapter.get("task_type") == "SEQ_CLS"

    def front(self) -> dict[str, Any]:
        kind = "lora" if self.manifest.kind == "lora" else f"{self.manifest.kind}-adapter"
        data = self.manifest.options.get("data")
        sets = [str(data).split(":")[0]] if isinstance(data, str) and _is_data_set(data) else []
        tag = "text-classification" if self._has_head else "text-generation"
        task = {"pipeline_tag": tag} if self.manifest.kind != "decomposed" else {}
        return {
            **_base_model(self._weights_id or self.context.repos.base_id, {"base_model_relation": "adapter"}),
            "library_name": "peft",
            **task,
            **({"datasets": sets} if sets else {}),
            "tags": _tags(self.manifest, kind),
        }

    def what(self) -> str:
        base = _named(self.context.repos.base_id, "its base")
        if self.manifest.kind == "lora":
            return f"A plain LoRA for {base}, untouched: scale 1, the same to every engine."
        if self.manifest.kind == "decomposed":
            return (
                f"An initial {self.manifest.method} adapter for {base}, in `{_folder(self.manifest)}`; it is "
                "to be trained, and changes nothing before."
            )
        if not self._on_residual:
            return f"A {self.manifest.method} adapter for {base}, trained from `{_folder(self.manifest)}`."
        return (
            f"A {self.manifest.method} adapter, trained against the residual base "
            f"{_named(self.context.repos.residual_id, 'it started from')} of {base}; "
            f"`{_folder(self.manifest)}` is its start. **It is wrong on the base itself**: load it on the "
            "residual base, or convert it into a LoRA for the base with `svdconvert to-lora`."
        )

    def loading(self) -> str:
        repository, weights = self.context.repository, self._weights_id
        merge = f"```\nsvdconvert merge {repository} -o merged\n```"
        if self.context.adapter.get("peft_type") != "LORA":
            return f"Stock PEFT has no such adapter. Merge it:\n\n{merge}"
        if self._has_head:
            return (
                f"It holds a head of its own, with its labels. Merged they are a plain checkpoint:\n\n{merge}"
            )
        folder = f', subfolder="{_folder(self.manifest)}"' if self.manifest.kind == "decomposed" else ""
        name = "residual" if self._on_residual else "base"
        return _python(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'{name} = AutoModelForCausalLM.from_pretrained("{weights or name.upper()}")\n'
            f'model = PeftModel.from_pretrained({name}, "{repository}"{folder}{_at(self.context.revision)})'
        ) + ("" if weights else f"\n\n{name.upper()} is the directory of the model that it belongs to.")


_TASKS = {CAUSAL: "text-generation", "AutoModelForSequenceClassification": "text-classification"}


def _residual_code(manifest: Manifest, context: CardContext, repository: str) -> str:
    train = f"```\nsvdconvert train {context.repository} -o trained --data train.jsonl\n```"
    if not context.config or context.adapter.get("peft_type") != "LORA":
        return f"svdconvert trains it; stock PEFT does not know its like:\n\n{train}"
    load = _python(
        f"from peft import PeftModel\nfrom transformers import {auto_class(context.config)}\n\n"
        f"residual = {auto_class(context.config)}.from_pretrained({repository})\n"
        f'model = PeftModel.from_pretrained(residual, {repository}, subfolder="{_folder(manifest)}", '
        "is_trainable=True)"
    )
    return (
        f"{load}\n\nTrain `model` as any PEFT model and convert what comes out with `svdconvert to-lora "
        f"ADAPTER -o lora --residual {context.repository}`, or let svdconvert train it:\n\n{train}"
    )


def _rwkv_code(manifest: Manifest, context: CardContext) -> str:
    """For weights without a configuration: RWKV's own file, or what svdconvert reads."""
    file = next((name for name in manifest.files if name.endswith(".pth")), None)
    if file is None:
        return f"```\nsvdconvert inspect {context.repository}\n```"
    return _python(
        "from huggingface_hub import hf_hub_download\nfrom rwkv.model import RWKV\n\n"
        f'model = RWKV(hf_hub_download("{context.repository}", "{file}"{_at(context.revision)}), "cpu fp32")'
    )


def _numbers(manifest: Manifest, context: CardContext) -> dict[str, str]:
    """What the manifest has measured."""
    matrices = list(manifest.matrices.values())
    energies = [matrix.energy for matrix in matrices if matrix.energy is not None]
    ranks = sorted({matrix.rank for matrix in matrices})
    cut = manifest.options.get("truncation")
    rows = {
        "method": manifest.method,
        "layout": manifest.layout,
        "matrices": str(len(matrices)) if matrices else "",
        "rank": ", ".join(map(str, ranks)) or str(manifest.options.get("rank") or ""),
        "share of the base in the adapter": f"{sum(energies) / len(energies):.1%}" if energies else "",
        "largest relative error as stored": f"{max(m.error for m in matrices):.2e}" if energies else "",
        "left out of the change": f"{cut['error']:.2e} of its norm" if cut else "",
        **_losses(context.metrics),
    }
    return {name: value for name, value in rows.items() if value}


def _losses(metrics: Path | None) -> dict[str, str]:
    if metrics is None:
        return {}
    logs = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    held_out = [log["eval_loss"] for log in logs if "eval_loss" in log]
    return {
        "steps": str(len(losses)),
        "loss": f"{losses[0]:.4f} to {losses[-1]:.4f}" if losses else "",
        "held-out loss": f"{held_out[0]:.4f} to {held_out[-1]:.4f}" if held_out else "",
    }


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _base_model(base: str | None, relation: Mapping[str, str]) -> dict[str, Any]:
    return {"base_model": base, **relation} if base else {}


def _tags(manifest: Manifest, *others: str) -> list[str]:
    return sorted({"svdconvert", manifest.method, *others} - {""})


def _named(repository: str | None, otherwise: str) -> str:
    return f"[{repository}]({endpoint()}/{repository})" if repository else otherwise


def _at(revision: str | None) -> str:
    return f', revision="{revision}"' if revision else ""


def _folder(manifest: Manifest) -> str:
    """Of the initial adapter."""
    return next((name.split("/")[0] for name in manifest.files if "/" in name), "")


def _is_data_set(data: str) -> bool:
    """org/name[:config], and no file."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data) is not None and not Path(data).suffix
