"""The model card: what a repository holds and does not hold, how to load it, how it was made.

The text is the template `card.md.jinja`; this file decides which of its parts apply.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
import yaml

from svdconvert.hub.auth import endpoint
from svdconvert.layouts.loading import CAUSAL, auto_class, vllm_advice
from svdconvert.manifest.results import LoraResult, MergeResult
from svdconvert.manifest.schema import PLAIN, Manifest
from svdconvert.output.measurements import losses
from svdconvert.publish.command_line import command_of
from svdconvert.publish.files import SourceRepos

TEMPLATE = Path(__file__).with_name("card.md.jinja")
_LICENCE = ("license", "license_name", "license_link")
_STAMP = re.compile(r"\n<!-- written by svdconvert ([0-9a-f]{16}) -->\n$")
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_TASKS = {CAUSAL: "text-generation", "AutoModelForSequenceClassification": "text-classification"}


@dataclass(frozen=True, kw_only=True)
class CardContext:
    """What a card says in addition to the manifest."""

    repository: str
    revision: str | None
    repos: SourceRepos
    config: Mapping[str, Any]
    """The model's config.json; empty for an adapter alone."""
    adapter: Mapping[str, Any]
    """adapter_config.json, initial or trained; empty if there is none."""
    licence: Mapping[str, Any]
    """The licence entries of the base's front matter."""
    metrics: Path | None = None
    absent: tuple[str, ...] = ()
    """Files of code that config.json names and the repository lacks."""


def write_card(manifest: Manifest, context: CardContext) -> str:
    """README.md with its front matter, and a checksum by which an edited card is recognised."""
    from huggingface_hub import ModelCard, ModelCardData

    card = _Card(manifest, context)
    data = ModelCardData(**card.metadata, **dict(context.licence))
    made = ModelCard.from_template(data, template_path=str(TEMPLATE), **card.variables)
    return stamped(str(made).rstrip() + "\n")


def stamped(text: str) -> str:
    """The text with a checksum of itself at its end."""
    return f"{text}\n<!-- written by svdconvert {xxhash.xxh3_64_hexdigest(text.encode())} -->\n"


def is_untouched(card: str) -> bool:
    """True for a card that `write_card` wrote and nobody has edited."""
    found = _STAMP.search(card)
    return found is not None and stamped(card[: found.start()]) == card


def licence_of(card: str) -> dict[str, Any]:
    """The licence entries of a card's front matter."""
    found = _FRONT.match(card)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except Exception:  # a tag such as !!timestamp raises whatever its text leads to
        return {}
    entries = front if isinstance(front, dict) else {}
    return {key: entries[key] for key in _LICENCE if isinstance(entries.get(key), str | list)}


@dataclass(frozen=True)
class _Card:
    """The decisions behind one card."""

    manifest: Manifest
    context: CardContext

    @cached_property
    def holds_adapter(self) -> bool:
        """True if the repository's own weights are an adapter's, initial or trained."""
        manifest = self.manifest
        return bool(self.context.adapter) and not (manifest.kind == "decomposed" and manifest.checksums)

    @cached_property
    def variant(self) -> str:
        """Which description the template prints."""
        manifest = self.manifest
        if manifest.kind in PLAIN:
            return manifest.kind
        if manifest.kind == "lora":
            return "lora"
        if manifest.kind == "trained":
            return "on_residual" if manifest.base_is_residual else "trained"
        if self.holds_adapter:
            return "initial"
        return "residual" if manifest.base_is_residual else "copy"

    @cached_property
    def loader(self) -> str:
        """Which way to load it the template prints."""
        stock = self.context.adapter.get("peft_type") == "LORA"
        if self.holds_adapter:
            if not stock:
                return "merge"
            return "merge_head" if self.has_head else "peft"
        if self.manifest.kind == "decomposed":
            return "residual" if stock and self.context.config else "train"
        if self.context.config:
            return "transformers"
        return "rwkv" if self.weights_file else "inspect"

    @property
    def has_head(self) -> bool:
        """True for an adapter with a classification head."""
        return self.context.adapter.get("task_type") == "SEQ_CLS"

    @property
    def weights_file(self) -> str | None:
        """The single file of an RWKV-6 in its author's format."""
        return next((name for name in self.manifest.files if name.endswith(".pth")), None)

    @property
    def weights_id(self) -> str | None:
        """The repository of the model that the adapter is loaded on."""
        repos = self.context.repos
        return repos.residual_id if self.variant == "on_residual" else repos.base_id

    @property
    def metadata(self) -> dict[str, Any]:
        """The front matter without the licence."""
        base = self.context.repos.base_id
        tags = {"svdconvert", self.manifest.method} - {""}
        if self.holds_adapter:
            weights = self.weights_id or base
            kind = "lora" if self.manifest.kind == "lora" else f"{self.manifest.kind}-adapter"
            task = "text-classification" if self.has_head else "text-generation"
            return {
                "base_model": weights,
                "base_model_relation": "adapter" if weights else None,
                "library_name": "peft",
                "pipeline_tag": None if self.manifest.kind == "decomposed" else task,
                "datasets": self._datasets(),
                "tags": sorted({*tags, kind}),
            }
        plain = self.manifest.kind in PLAIN and self.context.config
        return {
            "base_model": base,
            "base_model_relation": "finetune" if base and self.manifest.kind != "converted" else None,
            "library_name": "transformers" if self.context.config else None,
            "pipeline_tag": _TASKS.get(auto_class(self.context.config)) if plain else None,
            "tags": sorted({*tags, "residual-base" if self.variant == "residual" else self.manifest.kind}),
        }

    def _datasets(self) -> list[str] | None:
        data = self.manifest.options.get("data")
        names = [data] if isinstance(data, str) else data or []
        return [name.split(":")[0] for name in names if _is_data_set(name)] or None

    @property
    def variables(self) -> dict[str, Any]:
        """The template's variables."""
        manifest = self.manifest
        context = self.context
        subfolder = f', subfolder="{manifest.init_directory}"' if manifest.kind == "decomposed" else ""
        return {
            "title": context.repository.split("/")[-1],
            "repository": context.repository,
            "variant": self.variant,
            "loader": self.loader,
            "base": _link(context.repos.base_id, "its base"),
            "residual": _link(context.repos.residual_id, "it started from"),
            "layout": manifest.layout,
            "method": manifest.method,
            "matrices": len(manifest.matrices),
            "init_directory": manifest.init_directory,
            "auto_class": auto_class(context.config),
            "trust": ", trust_remote_code=True" if "auto_map" in context.config else "",
            "revision": f', revision="{context.revision}"' if context.revision else "",
            "subfolder": subfolder,
            "owner": "residual" if self.variant == "on_residual" else "base",
            "weights": self.weights_id,
            "weights_file": self.weights_file,
            "absent_code": context.absent,
            "numbers": _numbers(manifest, context.metrics),
            "command": command_of(manifest, context.repository),
            "version": manifest.svdconvert,
        }


def _numbers(manifest: Manifest, metrics: Path | None) -> dict[str, str]:
    """What was measured, as rows of a table."""
    matrices = list(manifest.matrices.values())
    energies = [matrix.energy for matrix in matrices if matrix.energy is not None]
    ranks = sorted({matrix.rank for matrix in matrices})
    lora = manifest.result if isinstance(manifest.result, LoraResult) else None
    cut = lora.truncation if lora else None
    rows = {
        "method": manifest.method,
        "layout": manifest.layout,
        "matrices": str(len(matrices)) if matrices else "",
        "rank": ", ".join(map(str, ranks)) or (str(lora.rank) if lora else ""),
        "share of the base in the adapter": f"{sum(energies) / len(energies):.1%}" if energies else "",
        "largest relative error as stored": f"{max(m.error for m in matrices):.2e}" if energies else "",
        "left out of the change": f"{cut.error:.2e} of its norm" if cut else "",
        "lost by rounding": f"{lora.rounding:.2e} of the change's norm" if lora and lora.rounding else "",
        "update as stored": _kept(manifest),
        "vLLM": f"`{advice}`" if lora and (advice := vllm_advice(lora.rank)) else "",
        **_losses(metrics),
    }
    return {name: value for name, value in rows.items() if value}


def _kept(manifest: Manifest) -> str:
    """How much of the update rounding left in a merged checkpoint; empty if that is not known."""
    update = manifest.result.update if isinstance(manifest.result, MergeResult) else None
    return f"cosine {update.cosine:.4f} with the intended one, {update.kept:.1%} of it kept" if update else ""


def _losses(metrics: Path | None) -> dict[str, str]:
    if metrics is None:
        return {}
    trained, held_out = losses(metrics)
    return {
        "steps": str(len(trained)),
        "loss": f"{trained[0]:.4f} to {trained[-1]:.4f}" if trained else "",
        "held-out loss": f"{held_out[0]:.4f} to {held_out[-1]:.4f}" if held_out else "",
    }


def _link(repository: str | None, otherwise: str) -> str:
    return f"[{repository}]({endpoint()}/{repository})" if repository else otherwise


def _is_data_set(data: str) -> bool:
    """True for org/name[:config], False for a file."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data) is not None and not Path(data).suffix
