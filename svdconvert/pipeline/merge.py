"""Merge what training changed back into a plain checkpoint, one tensor at a time."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from math import hypot
from typing import Any, Literal

import torch
from torch import Tensor

from svdconvert.checkpoint.rename_rules import sort_by_rules
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, dtype_code, tensor_bytes, torch_dtype
from svdconvert.config.options import MergeOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.layouts.base import Layout
from svdconvert.linalg.delta import Product, as_lora, merged_
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.threads import parallel_matrices
from svdconvert.manifest.fingerprint import checksum
from svdconvert.manifest.schema import head_of
from svdconvert.output.plan import PlannedFile, plan_model
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.runner import TensorJob, TensorResult

Side = Literal["base", "residual"]


@dataclass(frozen=True)
class MergePlan:
    """What will be written, known from headers alone."""

    change: AdapterDelta
    side: Side
    modules: Mapping[str, str]
    """Tensor -> module, of the adapted matrices."""
    extras: Mapping[str, str]
    """Tensor -> parameter, of those that were trained whole and are replaced."""
    added: Mapping[str, str]
    """Tensor -> parameter, of a head that was trained on top and is new to the model."""
    shards: tuple[PlannedFile, ...]
    dtypes: Mapping[str, str]
    """Element type of every merged matrix."""
    stochastic: bool = False
    """Round by chance."""
    seed: int = 0


def plan_merge(
    change: AdapterDelta, source: TensorSource, side: Side, layout: Layout, options: MergeOptions
) -> MergePlan:
    """Plan from headers. Raises ArtifactError where the adapter does not fit the model."""
    slots = layout.slots(source.infos)
    # An adapter for another layout of the family speaks of modules as the family's network does.
    by_module = {layout.network_path(name): name for name in slots} if layout.family else {}
    by_module |= {slot.module: name for name, slot in slots.items()}
    if lost := [module for module in change.modules if module not in by_module]:
        raise ArtifactError(
            f"{change.directory} adapts {lost[0]}, which the model does not have as a matrix of its layers "
            f"({len(lost)} such modules); give the model that it was made for"
        )
    modules = {by_module[module]: module for module in change.modules}
    for name, module in modules.items():
        _refuse_shape(change, module, source.infos[name])
    added = _added(change, source, layout)
    extras = _replaced(change, source, layout, set(added.values()))
    dtypes = {name: _merged_code(change, source.infos[name], options) for name in [*modules, *extras]}
    outputs = [replace(info, dtype=dtypes.get(name, info.dtype)) for name, info in source.infos.items()]
    outputs += [_new(change, name, parameter) for name, parameter in added.items()]
    return MergePlan(
        change,
        side,
        modules,
        extras,
        added,
        tuple(_files(outputs, side, layout, options)),
        dtypes,
        options.rounding == "stochastic",
        options.seed,
    )


def _files(outputs: list[TensorInfo], side: Side, layout: Layout, options: MergeOptions) -> list[PlannedFile]:
    """The files of the plain checkpoint, with the tensors in the order of the source or, where that is a
    residual in an order of its own, of the layout."""
    limit = parse_size(options.max_shard_size)
    if layout.family is None:
        return plan_model(outputs, limit)
    if side == "residual":
        by_name = {info.name: info for info in outputs}
        outputs = [by_name[name] for name in sort_by_rules(by_name, layout.family.rules)]
    return plan_model(outputs, limit, layout.family.file)


def _added(change: AdapterDelta, source: TensorSource, layout: Layout) -> dict[str, str]:
    """Tensor -> parameter, for what a head brings that the model does not have."""
    if not head_of(change.manifest):
        return {}
    stored = {layout.runtime_name(name) for name in source.infos}
    prefixed = any(name.startswith(layout.prefix) for name in source.infos)
    return {
        parameter if prefixed else parameter.removeprefix(layout.prefix): parameter
        for parameter in change.after.extras
        if parameter not in stored
    }


def _new(change: AdapterDelta, name: str, parameter: str) -> TensorInfo:
    return replace(change.after.source.infos[change.after.extras[parameter]], name=name)


def write_added(plan: MergePlan, staged: StagedOutput) -> None:
    """The head's tensors, which no tensor of the model becomes."""
    files = {info.name: file.path for file in plan.shards for info in file.infos}
    noted: dict[str, dict[str, str]] = {}
    for name, parameter in plan.added.items():
        tensor = plan.change.extra(parameter)
        staged.write(files[name], name, tensor)
        noted.setdefault(files[name], {})[name] = checksum(tensor_bytes(tensor))
    staged.finish("head", {"files": noted})


def _replaced(
    change: AdapterDelta, source: TensorSource, layout: Layout, added: Collection[str]
) -> dict[str, str]:
    """Tensor -> parameter, for what the adapter trained whole of what the model has."""
    by_parameter = {layout.runtime_name(name): name for name in source.infos}
    replaced = {parameter: key for parameter, key in change.after.extras.items() if parameter not in added}
    for parameter, key in replaced.items():
        shape = change.after.source.infos[key].shape
        if parameter not in by_parameter:
            raise ArtifactError(
                f"{change.directory} trained {parameter} whole, which the model does not store (its head may "
                "be tied to the embeddings); merge it with PEFT into a model that has it"
            )
        if shape != (known := source.infos[by_parameter[parameter]].shape):
            raise ArtifactError(
                f"{change.directory} trained {parameter} with the shape {shape}, and the model has it with "
                f"{known}; give the model that it was made for"
            )
        if parameter.endswith("embed_tokens.weight") and not any("head" in name for name in source.infos):
            raise ArtifactError(
                f"{change.directory} trained {parameter} whole, which the model ties to its head: merging "
                "would change the head too; untie them first, or train without it"
            )
    return {by_parameter[parameter]: parameter for parameter in replaced}


def _refuse_shape(change: AdapterDelta, module: str, info: TensorInfo) -> None:
    adapted = (change.after.shape(module, "lora_B")[0], change.after.shape(module, "lora_A")[1])
    if adapted != info.shape:
        raise ArtifactError(
            f"{change.directory} adapts {module} as {adapted}, but {info.name} has the shape {info.shape}"
        )


def _merged_code(change: AdapterDelta, info: TensorInfo, options: MergeOptions) -> str:
    if options.dtype != "auto":
        return dtype_code(getattr(torch, options.dtype))
    known = change.manifest.matrices.get(info.name) if change.manifest else None
    return known.dtype if known else info.dtype


def merge_work(plan: MergePlan, device: torch.device, expected: Mapping[str, str], origin: str) -> TensorJob:
    """How each tensor of the base or residual is merged or copied."""
    copies = {
        info.name: file.path for file in plan.shards for info in file.infos if info.name not in plan.added
    }
    return TensorJob(
        order=list(copies),
        matrices={**plan.modules, **plan.extras},
        compute=lambda name, stored: _merge_one(plan, name, copies[name], stored.to(device)),
        copies=copies,
        parallelism=parallel_matrices(device),
        expected=expected,
        origin=origin,
    )


def _merge_one(plan: MergePlan, name: str, file: str, stored: Tensor) -> TensorResult:
    dtype = torch_dtype(plan.dtypes[name])
    if name in plan.extras:
        return TensorResult({(file, name): plan.change.extra(plan.extras[name]).to(dtype)})
    module = plan.modules[name]
    after, scale = plan.change.end(module)
    told = plan.side == "base" or not plan.change.is_lost
    update = as_lora(after, scale, *plan.change.start(module)) if told else None
    if plan.side == "residual":
        left, right = after.folded()
        product = left * scale, right
    else:
        assert update is not None
        product, update = update, None
    chance = Solver(name, seed=plan.seed).generator() if plan.stochastic and dtype != torch.float32 else None
    merged, realised = merged_(stored, _on(product, stored), dtype, update and _on(update, stored), chance)
    return TensorResult({(file, name): merged.cpu()}, asdict(realised) if realised and told else {})


def _on(product: Product, like: Tensor) -> Product:
    return product[0].to(like.device), product[1].to(like.device)


def update_note(notes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How much of the intended update is in the merged matrices, over all of them and by tensor."""
    found = {name: note for name, note in notes.items() if note}
    if not found:
        return {}
    sizes = [note["size"] for note in found.values()]
    along = sum(note["kept"] * note["size"] ** 2 for note in found.values())
    # cosine = along / (|intended| |realised|), by tensor
    lengths = [note["kept"] * note["size"] / note["cosine"] for note in found.values() if note["cosine"]]
    whole = hypot(*lengths) if lengths else 0.0
    return {
        "update": {
            "cosine": along / (hypot(*sizes) * whole) if whole else 0.0,
            "kept": along / hypot(*sizes) ** 2,
            "matrices": {name: dict(note) for name, note in found.items()},
        }
    }
