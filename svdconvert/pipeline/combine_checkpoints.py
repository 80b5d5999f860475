"""combine: several checkpoints are merged into one, one tensor of each in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import torch_dtype
from svdconvert.checkpoint.values import cast_finite
from svdconvert.config.combine import CombineOptions
from svdconvert.config.execution import Run
from svdconvert.errors import TargetError
from svdconvert.inputs.config_differences import remarks_on_configs
from svdconvert.linalg.delta import realised_changes
from svdconvert.linalg.threads import pick_device
from svdconvert.manifest.results import MergeResult
from svdconvert.manifest.schema import Manifest, roles_of
from svdconvert.merging.base import Blocks
from svdconvert.output.plan import PlannedFile
from svdconvert.output.sidecars import complete_checkpoint, read_config, write_config
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.checkpoint_plan import CheckpointPlan, Merged
from svdconvert.pipeline.merge import measured_update, remark_on_nothing, remark_on_rounding
from svdconvert.pipeline.runner import TensorJob, TensorResult, file_checksums, notes, stream
from svdconvert.quantization.view import read_to_compute

_BLOCK = 1 << 19  # entries of a tensor that are merged at a time: 2 MB of each model, in the cache
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""The keys of config.json for the number of layers."""


@dataclass(frozen=True)
class CheckpointJob:
    """The merge of several checkpoints."""

    plan: CheckpointPlan
    from_file: bool = False
    """True if a file in mergekit's format describes the merge, False if the options do."""
    command: str = "combine"

    @property
    def options(self) -> CombineOptions:
        """The options as the user gave them."""
        return self.plan.options

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """The shards of the new checkpoint."""
        return self.plan.shards

    @property
    def inputs(self) -> list[Path]:
        """All models."""
        return [model.path for model in self.plan.models]

    def identity(self) -> dict[str, Any]:
        """The models in their order, and what the file says of them."""
        models = {f"model {n}": model.identity() for n, model in enumerate(self.plan.models, 1)}
        return {**models, "file": asdict(self.plan.file)}

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Merge or copy every tensor."""
        device = pick_device(run.device, run.ranks.local)
        stream(combine_work(self.plan, device), self.plan.source, staged, run)

    def write_sidecars(self, directory: Path) -> None:
        """The sidecars of the base, or of the first model, with the new number of layers."""
        kept = self.plan.models[self.plan.first]
        complete_checkpoint(kept.sidecars, directory, self.plan.shards, was_decoded=kept.is_decoded)
        if self.plan.layers is not None:
            write_config(directory, with_layers(read_config(directory), self.plan.layers))

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the new checkpoint."""
        return Manifest(
            kind="merged",
            command="combine",
            layout=self.plan.layout,
            method=self.plan.method_name,
            base=self.plan.models[self.plan.first].origin(),
            options=asdict(self.options) | self._description(),
            result=MergeResult(side="base", update=measured_update(notes(staged, self.plan.dtypes))),
            files=file_checksums(staged),
            roles=roles_of(self.files),
            threads=threads,
        )

    def _description(self) -> dict[str, Any]:
        """For the manifest: what the file says, or the models in the order of the weights."""
        if self.from_file:
            return {"file": asdict(self.plan.file)}
        found = [source.model for part in self.plan.file.slices for source in part.sources]
        return {"inputs": found, "base": self.plan.file.base}

    def remarks(self, manifest: Manifest) -> Iterator[str]:
        """Warnings if rounding lost too much of some updates, and if the models have other settings."""
        yield from remark_on_rounding(manifest, "--dtype float32 keeps it")
        kept = self.plan.models[self.plan.first]
        if self.plan.method_name != "passthrough" and self.plan.layers is None:
            yield from remark_on_nothing(manifest, "the changes cancel, or there are none", kept.path)
        yield from remarks_on_configs(kept, [model for model in self.plan.models if model is not kept])


def combine_work(plan: CheckpointPlan, device: torch.device) -> TensorJob:
    """How each tensor is merged or copied. The models beside the first are read when a tensor is merged."""
    copies = {info.name: file.path for file in plan.shards for info in file.infos}
    return TensorJob(
        order=list(copies),
        matrices=plan.dtypes,
        compute=lambda name, stored: _merge_tensor(plan, name, copies[name], stored),
        copies=copies,
        device=device,
        origin=str(plan.models[plan.first].path),
    )


def _merge_tensor(plan: CheckpointPlan, name: str, file: str, stored: Tensor) -> TensorResult:
    """Merge block by block, into the memory of the tensor itself if the element type stays."""
    merged = plan.tensors[name]
    dtype = torch_dtype(plan.dtypes[name])
    result = stored if stored.dtype == dtype else torch.empty_like(stored, dtype=dtype)
    result_RC = _rows_of(result)

    def merged_blocks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(start, merged rows, the same as written), a block at a time."""
        for rows, start, exact in _merged_rows(plan, merged, stored):
            if not exact.isfinite().all():
                raise _not_finite(plan, merged)
            written = cast_finite(name, exact, dtype)
            yield start, exact, written
            result_RC[rows] = written  # after the yield, as `start` may be the same memory

    realised = realised_changes(merged_blocks())
    if realised is not None and not isfinite(realised.size):
        raise _not_finite(plan, merged)
    return TensorResult({(file, name): result}, asdict(realised) if realised else {})


def _merged_rows(
    plan: CheckpointPlan, merged: Merged, stored: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, the base's in float32, the merged ones in float32), until all rows were given.

    The other models' tensors are in memory as they are stored, and a block of all models in float32. A method
    that needs entire changes gets these in float32.
    """
    where = merged.settings.base or 0
    parts_RC = [
        _rows_of(stored if position == where else _read_part(plan, *part, stored.device))
        for position, part in enumerate(merged.parts)
    ]
    blocks = _row_slices(parts_RC[where])
    method = plan.method
    if method.weights is not None:
        weights = Blocks(
            stored.numel(), lambda: ([part[rows].float() for part in parts_RC] for rows in blocks)
        )
        for rows, exact in zip(blocks, method.weights(weights, merged.settings), strict=True):
            yield rows, parts_RC[where][rows].float(), exact
        return
    base_RC = parts_RC.pop(where)
    if method.blocks is not None:
        changes = Blocks(
            stored.numel(),
            lambda: ([_change(part[rows], base_RC[rows]) for part in parts_RC] for rows in blocks),
        )
        found = method.blocks(changes, merged.settings)
    else:
        assert method.changes is not None
        # Each tensor is freed once its change is there.
        whole = [
            _whole_change(parts_RC.pop(0), base_RC, blocks).view(stored.shape) for _ in range(len(parts_RC))
        ]
        total_RC = _rows_of(method.changes(whole, merged.settings))
        found = (total_RC[rows] for rows in blocks)
    for rows, change in zip(blocks, found, strict=True):
        start = base_RC[rows].float()
        yield rows, start, change.add_(start)


def _read_part(plan: CheckpointPlan, index: int, name: str, device: torch.device) -> Tensor:
    return read_to_compute(plan.models[index].source, name).to(device)


def _rows_of(tensor: Tensor) -> Tensor:
    """The tensor as a matrix with its last dimension as columns: a view."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    return tensor.view(tensor.numel() // max(1, columns), columns)


def _row_slices(tensor_RC: Tensor) -> list[slice]:
    """Blocks of whole rows with about `_BLOCK` entries."""
    count, columns = tensor_RC.shape
    step = max(1, _BLOCK // max(1, columns))
    return [slice(start, start + step) for start in range(0, count, step)]


def _change(tuned: Tensor, base: Tensor) -> Tensor:
    """tuned - base in float32, in memory of its own."""
    return tuned.to(torch.float32, copy=True).sub_(base.float())


def _whole_change(tuned_RC: Tensor, base_RC: Tensor, blocks: Sequence[slice]) -> Tensor:
    """`_change` of all rows."""
    change_RC = torch.empty_like(base_RC, dtype=torch.float32)
    for rows in blocks:
        change_RC[rows] = _change(tuned_RC[rows], base_RC[rows])
    return change_RC


def _not_finite(plan: CheckpointPlan, merged: Merged) -> TargetError:
    """The error for a tensor without a finite norm, with the model that makes it so."""
    for index, own in merged.parts:
        if not _has_norm(read_to_compute(plan.models[index].source, own).float()):
            return TargetError(
                f"{own} of {plan.models[index].path} holds NaN, Inf or values whose squares overflow; repair "
                "the checkpoint"
            )
    name = merged.parts[merged.settings.base or 0][1]
    return TargetError(f"the values of {name} overflow when they are merged; give smaller --weights")


def _has_norm(tensor: Tensor) -> bool:
    """True if the sum of the squares is finite in float32, in which methods compute."""
    flat = tensor.reshape(-1)
    return isfinite(float(torch.dot(flat, flat)))


def with_layers(config: Mapping[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
    """A config.json for other layers: their number, and the entries of lists with one for each layer."""
    changed = dict(config)
    if isinstance(text := changed.get("text_config"), Mapping):
        changed["text_config"] = with_layers(text, layers)
    for key in _COUNTS:
        if isinstance(count := config.get(key), int):
            changed[key] = len(layers)
            changed |= {
                name: [value[min(layer, count - 1)] for layer in layers]
                for name, value in config.items()
                if isinstance(value, list) and len(value) == count and name.startswith("layer")
            }
    return changed
