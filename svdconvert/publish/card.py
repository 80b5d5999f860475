"""The model card: what a repository holds and does not hold, how to load it, how it was made.

The text is the template `card.md.jinja`; this file decides which of its parts apply.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from svdconvert.hub.auth import endpoint
from svdconvert.layouts.loading import CAUSAL, auto_class, vllm_advice
from svdconvert.manifest.evaluations import EvaluationResult
from svdconvert.manifest.results import LoraResult, MergeResult
from svdconvert.manifest.schema import PLAIN, Manifest
from svdconvert.manifest.training import Training, is_hub_data
from svdconvert.output.stamp import is_stamped, stamped
from svdconvert.publish.card_results import model_index, result_rows
from svdconvert.publish.card_text import cell
from svdconvert.publish.card_training import (
    generation_code,
    loss_curve,
    prompt_lines,
    sample_blocks,
    training_rows,
)
from svdconvert.publish.command_line import command_of
from svdconvert.publish.files import SourceRepos

TEMPLATE = Path(__file__).with_name("card.md.jinja")
_INHERITED = ("license", "license_name", "license_link", "language")
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
    inherited: Mapping[str, Any]
    """The entries on licence and language of the base's front matter."""
    training: Training | None = None
    results: Sequence[EvaluationResult] = ()
    """Evaluations of these weights."""
    has_tokenizer: bool = False
    """True if the repository has a tokenizer of its own."""
    absent: tuple[str, ...] = ()
    """Files of code that config.json names and the repository lacks."""


def write_card(manifest: Manifest, context: CardContext) -> str:
    """README.md with its front matter, and a checksum by which an edited card is recognised."""
    from huggingface_hub import ModelCard, ModelCardData

    card = _Card(manifest, context)
    data = ModelCardData(**card.metadata, **dict(context.inherited))
    made = ModelCard.from_template(data, template_path=str(TEMPLATE), **card.variables)
    return stamped(str(made).rstrip() + "\n")


def is_untouched(card: str) -> bool:
    """True for a card that `write_card` wrote and nobody has edited."""
    return is_stamped(card)


def inherited_entries(card: str) -> dict[str, Any]:
    """The entries on licence and language of a base's card."""
    found = _FRONT.match(card)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except Exception:  # a tag such as !!timestamp raises whatever its text leads to
        return {}
    entries = front if isinstance(front, dict) else {}
    return {key: entries[key] for key in _INHERITED if isinstance(entries.get(key), str | list)}


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
        """The front matter without what is inherited from the base."""
        tags = sorted({"svdconvert", self.manifest.method, self._tag} - {""})
        results = model_index(self.context.results, self._task or "text-generation")
        return {
            **self._relation(),
            "library_name": "peft" if self.holds_adapter else "transformers" if self.context.config else None,
            "pipeline_tag": self._task,
            "datasets": self._datasets(),
            "tags": tags,
            **({"model_name": self.title, "eval_results": results} if results else {}),
        }

    @property
    def title(self) -> str:
        """The repository's name without its owner."""
        return self.context.repository.split("/")[-1]

    @property
    def _tag(self) -> str:
        """What the weights are, for a search on the Hub."""
        if self.holds_adapter:
            return "lora" if self.manifest.kind == "lora" else f"{self.manifest.kind}-adapter"
        return "residual-base" if self.variant == "residual" else self.manifest.kind

    @property
    def _task(self) -> str | None:
        """The Hub's name of what the weights are used for; None if they are not used by themselves."""
        if self.holds_adapter:
            task = "text-classification" if self.has_head else "text-generation"
            return None if self.manifest.kind == "decomposed" else task
        plain = self.manifest.kind in PLAIN and self.context.config
        return _TASKS.get(auto_class(self.context.config)) if plain else None

    def _relation(self) -> dict[str, str]:
        """base_model and its relation.

        A residual has neither: every relation would show it on the base's page among the models that can be
        used in the base's place. Its base is in the text and in the manifest.
        """
        base = (
            self.weights_id or self.context.repos.base_id
            if self.holds_adapter
            else self.context.repos.base_id
        )
        if base is None or self.variant == "residual":
            return {}
        if self.manifest.kind == "converted":
            return {"base_model": base}
        return {"base_model": base, "base_model_relation": "adapter" if self.holds_adapter else "finetune"}

    def _datasets(self) -> list[str] | None:
        names = self.context.training.data if self.context.training else []
        return [name.split(":")[0] for name in names if is_hub_data(name)] or None

    def _generation_code(self) -> str:
        """Code that asks the loaded model; empty if that is not known, or if it answers with a class."""
        if self.loader not in ("peft", "transformers") or self._task != "text-generation":
            return ""
        own = self.context.has_tokenizer or not self.holds_adapter
        name = self.context.repository if own else self.weights_id or self.owner.upper()
        revision = f', revision="{self.context.revision}"' if own and self.context.revision else ""
        return generation_code(self.context.training, f'"{name}"{revision}{self._trust}')

    @property
    def _trust(self) -> str:
        return ", trust_remote_code=True" if "auto_map" in self.context.config else ""

    @property
    def owner(self) -> str:
        """What the adapter is loaded on."""
        return "residual" if self.variant == "on_residual" else "base"

    @property
    def variables(self) -> dict[str, Any]:
        """The template's variables."""
        manifest = self.manifest
        context = self.context
        subfolder = f', subfolder="{manifest.init_directory}"' if manifest.kind == "decomposed" else ""
        return {
            "title": self.title,
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
            "trust": self._trust,
            "revision": f', revision="{context.revision}"' if context.revision else "",
            "subfolder": subfolder,
            "owner": self.owner,
            "weights": self.weights_id,
            "weights_file": self.weights_file,
            "absent_code": context.absent,
            "numbers": _numbers(manifest),
            "training": training_rows(context.training, manifest.method),
            "curve": loss_curve(context.training),
            "prompt": prompt_lines(context.training),
            "generation": self._generation_code(),
            "samples": list(sample_blocks(context.training)),
            "results": result_rows(context.results),
            "command": command_of(manifest, context.repository),
            "version": manifest.svdconvert,
        }


def _numbers(manifest: Manifest) -> dict[str, str]:
    """What was measured, as rows of a table."""
    matrices = list(manifest.matrices.values())
    energies = [matrix.energy for matrix in matrices if matrix.energy is not None]
    ranks = sorted({matrix.rank for matrix in matrices})
    lora = manifest.result if isinstance(manifest.result, LoraResult) else None
    cut = lora.truncation if lora else None
    rows = {
        "method": cell(manifest.method),
        "layout": cell(manifest.layout),
        "matrices": str(len(matrices)) if matrices else "",
        "rank": ", ".join(map(str, ranks)) or (str(lora.rank) if lora else ""),
        "share of the base in the adapter": f"{sum(energies) / len(energies):.1%}" if energies else "",
        "largest relative error as stored": f"{max(m.error for m in matrices):.2e}" if energies else "",
        "left out of the change": f"{cut.error:.2%} of its norm" if cut else "",
        "lost by rounding": f"{lora.rounding:.2e} of the change's norm" if lora and lora.rounding else "",
        "update as stored": _kept(manifest),
        "vLLM": f"`{advice}`" if lora and (advice := vllm_advice(lora.rank)) else "",
    }
    return {name: value for name, value in rows.items() if value}


def _kept(manifest: Manifest) -> str:
    """How much of the update rounding left in a merged checkpoint; empty if that is not known."""
    update = manifest.result.update if isinstance(manifest.result, MergeResult) else None
    return f"cosine {update.cosine:.4f} with the intended one, {update.kept:.1%} of it kept" if update else ""


def _link(repository: str | None, otherwise: str) -> str:
    return f"[{repository}]({endpoint()}/{repository})" if repository else otherwise
