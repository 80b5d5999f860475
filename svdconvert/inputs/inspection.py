"""What a directory, file or model is, and which commands can follow."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from svdconvert.adapters.adapter_config import CONFIG, AdapterConfig, read_other_config
from svdconvert.adapters.equivalents import TYPES
from svdconvert.adapters.peft_files import is_adapter, open_adapter
from svdconvert.adapters.rwkv_peft import is_adapter_file, open_adapter_file
from svdconvert.checkpoint.safetensors_files import open_file
from svdconvert.config.display import Shown
from svdconvert.config.recipe import non_default_options, section_of
from svdconvert.errors import UnknownNameError
from svdconvert.hub.download import fetch
from svdconvert.inputs.engines import FORMATS, Engine, report_for
from svdconvert.inputs.grids import by_role_and_layer, grids_of
from svdconvert.inputs.model import OpenModel, open_headers
from svdconvert.inputs.storage_format import bits_per_weight, formats
from svdconvert.inputs.unfinished import read_unfinished
from svdconvert.layouts.loading import loading, loading_in_peft
from svdconvert.manifest.evaluations import manifest_fingerprint, read_evaluations
from svdconvert.manifest.schema import PLAIN, Manifest, Origin, has_manifest, read_manifest, training_of
from svdconvert.manifest.training import Training
from svdconvert.methods.base import METHODS
from svdconvert.output.sidecars import read_json_object
from svdconvert.quantization.view import DecodedSource


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """Description of a directory or model."""

    directory: str
    kind: str
    """checkpoint, adapter, unfinished, or the kind in its manifest."""
    summary: str
    """What it is, in one phrase."""
    next: list[str]
    """Commands that can follow."""
    details: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Losses of a training in the order of its steps, by name; empty if nothing is recorded of one."""
    grids: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    """What was measured of every matrix: title -> role -> layer -> value."""

    def shown_as(self) -> Mapping[str, object]:
        """What it is and the first command that can follow."""
        return {
            "directory": self.directory,
            "kind": self.kind,
            "summary": self.summary,
            "next": self.next[0] if self.next else None,
        }


def describe(model: str | Path, *, trust_remote_code: bool = False) -> Inspection:
    """Describe a directory or a model of the Hub, whose own code may only run if it is trusted.

    Raises SvdConvertError if it is of no known kind.
    """
    path = Path(model)
    if path.name.endswith(".partial") and (path / "journal.jsonl").exists():
        return _inspect_unfinished(path)
    path = path if path.exists() else fetch(str(model), "adapter").path
    if has_manifest(path):
        return _inspect_manifest(str(model), path, read_manifest(path))
    if is_adapter(path):
        return _inspect_adapter(path)
    if is_adapter_file(path) and any(name.endswith(".lora_A") for name in open_file(path).infos):
        return _inspect_adapter_file(path)
    return _inspect_checkpoint(str(model), trust_remote_code=trust_remote_code)


def describe_for(model: str | Path, engine: Engine) -> Inspection:
    """Describe what an engine refuses or ignores of an adapter. Raises ArtifactError if it is none."""
    path = Path(model)
    path = path if path.exists() else fetch(str(model), "adapter").path
    found = report_for(path, engine)
    state = "loads as it is" if found.loads else "refuses" if found.refused else "loads only in part"
    details = {
        "refused": "; ".join(found.refused),
        "ignored": "; ".join(found.ignored),
        "needs": "; ".join(found.needed),
    }
    commands = [] if found.loads else [f"svdconvert to-lora {model} -o LORA --format {FORMATS[engine]}"]
    return Inspection(str(model), "adapter", f"an adapter that {engine} {state}", commands, details)


def _inspect_unfinished(path: Path) -> Inspection:
    out = str(path).removesuffix(".partial")
    summary = f"the unfinished output of a run that writes {out}"
    again = f"the same command again, which continues and writes {out}"
    found = read_unfinished(path)
    if found is None:
        return Inspection(str(path), "unfinished", summary, [again])
    details = {"begun_by": f"svdconvert {found.version} {found.verb}", "so_far": found.finished}
    return Inspection(str(path), "unfinished", summary, [found.command or again], details)


def _inspect_manifest(name: str, path: Path, manifest: Manifest) -> Inspection:
    training = training_of(path, manifest)
    curves = {"loss": training.losses, "held-out loss": training.held_out} if training else {}
    details = {
        "written_by": f"svdconvert {manifest.svdconvert}",
        "method": manifest.method,
        "layout": manifest.layout,
        "base": _location(manifest.base),
        "residual": _location(manifest.residual),
        "options": non_default_options(section_of(manifest.kind, manifest.command), manifest.options),
        **({} if manifest.result is None else asdict(manifest.result)),
        **_matrix_details(manifest),
        **_training_details(training),
        "evaluations": _evaluation_details(path, manifest),
    }
    return Inspection(
        name,
        manifest.kind,
        _summary(manifest),
        _next_commands(name, manifest),
        details,
        curves={name: [value for _, value in points] for name, points in curves.items() if points},
        grids=by_role_and_layer(grids_of(manifest)),
    )


def _training_details(training: Training | None) -> dict[str, Any]:
    if training is None:
        return {}
    return {
        "trained_on": training.data,
        "steps": training.steps,
        "final_loss": training.losses[-1][1] if training.losses else None,
        "held_out_loss": training.held_out[-1][1] if training.held_out else None,
    }


def _evaluation_details(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The results of `eval`, those of other weights marked as such."""
    fingerprint = manifest_fingerprint(manifest)
    return [
        {
            "task": result.task,
            result.headline: result.score,
            "interval": list(result.grades["strict"].interval) if "strict" in result.grades else None,
            "rows": result.data.rows,
            "limit": result.data.limit,
            "of_these_weights": result.model.fingerprint == fingerprint,
        }
        for result in read_evaluations(path)
    ]


def _summary(manifest: Manifest) -> str:
    if manifest.kind == "finetuned":
        return "a plain checkpoint with all weights fine-tuned, which other programs can load"
    if manifest.kind in PLAIN:
        return f"a {manifest.kind} plain checkpoint, which other programs can load"
    if manifest.kind == "lora":
        return "a plain LoRA for the untouched base"
    if manifest.kind == "trained":
        return f"a trained {manifest.method} adapter"
    if not manifest.checksums:
        return f"an initial {manifest.method} adapter for the untouched base"
    return f"a residual base, not a usable model without the initial {manifest.method} adapter next to it"


def _next_commands(path: str, manifest: Manifest) -> list[str]:
    plain = [line for line in [loading(manifest.layout, path)] if line]
    form = manifest.options.get("format", "peft")
    in_peft = loading_in_peft(manifest.layout, path) if form in ("peft", "vllm") else ""
    peft = [in_peft] if in_peft else []
    if form == "gguf":
        return [f"llama-cli -m BASE.gguf --lora {path}/adapter.gguf", f"svdconvert verify {path}"]
    base = "" if manifest.base else " --base BASE"
    return {
        "decomposed": [f"svdconvert train {path} -o TRAINED --data FILE", f"svdconvert verify {path}"],
        "trained": [f"svdconvert to-lora {path} -o LORA", f"svdconvert merge {path} -o MERGED"],
        "finetuned": [*plain, f"svdconvert verify {path}"],
        "merged": [*plain, f"svdconvert verify {path}"],
        "converted": [*plain, f"svdconvert decompose {path} -o DECOMPOSED"],
        "lora": [*peft, f"svdconvert merge {path} -o MERGED{base}"],
    }[manifest.kind]


def _location(origin: Origin | None) -> str | None:
    if origin is None:
        return None
    if origin.revision:
        return f"{origin.location}@{origin.revision}"
    return origin.location if Path(origin.location).exists() else f"{origin.location} (not found)"


def _matrix_details(manifest: Manifest) -> dict[str, Any]:
    matrices = manifest.matrices.values()
    if not matrices:
        return {}
    method = METHODS.get(manifest.method)
    energies = [matrix.energy for matrix in matrices if matrix.energy is not None]
    return {
        "matrices": len(matrices),
        "roles": dict(Counter(matrix.role for matrix in matrices)),
        "trained_parameters": sum(method.trained_values(*matrix.shape, matrix.rank) for matrix in matrices),
        "mean_energy": sum(energies) / len(energies) if energies else None,
        "largest_error": max(matrix.error for matrix in matrices),
    }


def _inspect_adapter(path: Path) -> Inspection:
    kind = str(read_json_object(path / CONFIG).get("peft_type"))
    if kind in TYPES:
        config = read_other_config(path, TYPES[kind].rank_key, TYPES[kind].alpha_key)
        summary = f"{_adapter_summary(config)}, read as the LoRA that it equals"
        known = {"rank": config.rank, "base": config.base}
        return Inspection(str(path), "adapter", summary, _adapter_commands(path, config), known)
    adapter = open_adapter(path)
    config = adapter.config
    details = {
        "rank": config.rank,
        "alpha": config.alpha,
        "rslora": config.rslora,
        "modules": len(adapter.modules),
        "base": config.base,
        "initialised_as": config.initialised if isinstance(config.initialised, str) else None,
    }
    return Inspection(
        str(path), "adapter", _adapter_summary(config), _adapter_commands(path, config), details
    )


def _inspect_adapter_file(path: Path) -> Inspection:
    adapter = open_adapter_file(path, None)
    details = {
        "rank": adapter.config.rank,
        "modules": len(adapter.modules),
        "fully_trained": len(adapter.extras),
    }
    commands = [
        f"svdconvert merge {path} -o MERGED --base MODEL --init init_pissa.pth  (if it is PiSSA)",
        f"svdconvert merge {path} -o MERGED --base MODEL --alpha LORA_ALPHA  (if it is LoRA)",
    ]
    summary = (
        f"an adapter of rank {adapter.config.rank} in RWKV-PEFT's format, which does not store its scale"
    )
    return Inspection(str(path), "adapter", summary, commands, details)


def _adapter_summary(config: AdapterConfig) -> str:
    base = f"for the base {config.base}" if config.base else "which names no base"
    return f"a {config.peft_type} adapter of rank {config.rank} in PEFT's format, {base}"


def _adapter_commands(path: Path, config: AdapterConfig) -> list[str]:
    base = config.base if config.base and Path(config.base).is_dir() else "MODEL"
    if config.base and has_manifest(Path(config.base)):
        return [
            f"svdconvert to-lora {path} -o LORA --residual {base}",
            f"svdconvert merge {path} -o MERGED --residual {base}",
        ]
    return [
        f"svdconvert merge {path} -o MERGED --base {base}",
        f"svdconvert to-lora {path} -o LORA --residual DECOMPOSED  (if it was trained against a residual)",
    ]


def _storage(opened: OpenModel) -> dict[str, Any]:
    """How quantised weights are stored; empty if none is."""
    if not isinstance(opened.source, DecodedSource):
        return {}
    stored = opened.source.stored.infos.values()
    return {
        "quantised": formats(opened.source),
        "bits_per_quantised_weight": round(bits_per_weight(opened.source), 3),
        "stored_size_bytes": sum(info.nbytes for info in stored),
    }


def _inspect_checkpoint(model: str, *, trust_remote_code: bool) -> Inspection:
    opened = open_headers(model, trust_remote_code=trust_remote_code)
    infos = opened.source.infos
    details: dict[str, Any] = {
        "model_type": opened.config.get("model_type"),
        "tensors": len(infos),
        "size_bytes": sum(info.nbytes for info in infos.values()),
        "element_types": dict(Counter(info.dtype for info in infos.values())),
        **_storage(opened),
    }
    try:
        name, layout = opened.layout()
    except UnknownNameError as error:
        return Inspection(model, "checkpoint", f"a checkpoint of no known layout: {error}", [], details)
    slots = layout.slots(layout.divided(opened.source).infos)
    details |= {
        "layout": name,
        "matrices": len(slots),
        "roles": dict(Counter(slot.role for slot in slots.values())),
        "note": "; ".join(layout.remarks()) or None,
    }
    if not slots:
        reason = layout.without_slots(infos)
        return Inspection(
            model, "checkpoint", f"a checkpoint that cannot be decomposed: {reason}", [], details
        )
    commands = [
        f"svdconvert decompose {model} -o DECOMPOSED --plan",
        f"svdconvert decompose {model} -o DECOMPOSED",
    ]
    return Inspection(model, "checkpoint", f"a plain checkpoint of the {name} layout", commands, details)
