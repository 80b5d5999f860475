"""decompose: every target matrix becomes a residual and initial factors, one tensor at a time."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.adapters.adapter_config import CONFIG as ADAPTER_CONFIG
from svdconvert.adapters.peft_files import key
from svdconvert.checkpoint.tensors import REAL, TensorInfo, TensorSource, dtype_code, torch_dtype
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import TargetError
from svdconvert.inputs.model import OpenModel
from svdconvert.layouts.base import Layout, Slot
from svdconvert.linalg.blocks import total_energy
from svdconvert.linalg.delta import residual_
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.threads import parallel_matrices, pick_device
from svdconvert.linalg.triplets import Spectrum
from svdconvert.manifest.schema import Manifest, Matrix, roles_of
from svdconvert.methods.base import METHODS, Method, init_folder
from svdconvert.output.plan import PlannedFile, plan_divided
from svdconvert.output.sidecars import complete_checkpoint
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.adapter_plan import AdapterPlan, plan_adapter, stack_experts
from svdconvert.pipeline.adapter_targets import Chosen, matrix_shape
from svdconvert.pipeline.effects import refuse_idle_experts, refuse_idle_options
from svdconvert.pipeline.runner import (
    TensorJob,
    TensorResult,
    file_checksums,
    notes,
    source_checksums,
    stream,
)
from svdconvert.pipeline.scaling import Scaling, scalings

_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class DecomposePlan:
    """What will be written, planned from headers alone."""

    method: Method
    layout: str
    options: SplitOptions
    slots: Mapping[str, Slot]
    scalings: Mapping[str, Scaling]
    """Rank and scale, by tensor."""
    infos: Mapping[str, TensorInfo]
    """The tensors of the model; stacked experts are divided."""
    shards: tuple[PlannedFile, ...]
    adapter: AdapterPlan
    layout_in_use: Layout
    """The layout with the name `layout`."""
    without_role: tuple[str, ...] = ()
    """Matrices of the repeated blocks that the layout does not know and that stay as they are."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the plan."""
        remarks = self.layout_in_use.remarks()
        narrow = [name for name in self.slots if self._is_narrow(name)]
        if narrow:
            remarks += (
                f"{len(narrow)} matrices, such as {narrow[0]} {self.infos[narrow[0]].shape}, are narrower "
                f"than rank {self.options.rank} and have the highest rank that they can have",
            )
        if not self.without_role:
            return remarks
        return (
            *remarks,
            f"layout {self.layout} has no role for {', '.join(self.without_role[:8])} "
            f"({len(self.without_role)} such names): these matrices stay as they are",
        )

    def _is_narrow(self, name: str) -> bool:
        return self.scalings[name].rank == min(self.infos[name].shape) < self.options.rank

    @property
    def folder(self) -> str:
        """The folder of the initial adapter."""
        return init_folder(self.options.method)

    @property
    def files(self) -> list[PlannedFile]:
        """All files of tensors that are written and stay."""
        return [*self.shards, self.adapter.file]

    def residual_dtype(self, name: str) -> str:
        """The element type of the residual of the tensor `name`."""
        return _residual_code(self.options, self.method, self.infos[name])


def plan_decomposition(model: OpenModel, options: SplitOptions) -> DecomposePlan:
    """Plan from headers. Raises TargetError if a target cannot be decomposed."""
    layout_name, layout = model.layout(options.layout)
    source = layout.divided(model.source)
    method = METHODS.get(options.method).variant(options.init)
    if method.split is None:
        raise TargetError(
            f"{options.method} trains the weights themselves and has nothing to decompose; "
            f"use svdconvert train MODEL --method {options.method}"
        )
    refuse_idle_options(method, options)
    slots = layout.select(source.infos, options.targets)
    refuse_idle_experts(options.experts, any(slot.expert is not None for slot in slots.values()))
    if options.layout is not None:
        _refuse_partial_layout(layout_name, layout, source)
    scaled = scalings(layout, source.infos, slots, options)
    _refuse_unsuitable(source.infos, scaled)
    outputs = [
        replace(info, dtype=_residual_code(options, method, info))
        if name in slots and method.residual
        else info
        for name, info in source.infos.items()
    ]
    keep = method.residual or options.copy_base
    limit = parse_size(options.max_shard_size)
    shards = plan_divided(outputs, model.source.infos, limit) if keep else []
    adapter = plan_adapter(Chosen(layout, source.infos, slots, scaled, method, options))
    without_role = _matrices_without_role(model, layout, source.infos)
    return DecomposePlan(
        method,
        layout_name,
        options,
        slots,
        scaled,
        source.infos,
        tuple(shards),
        adapter,
        layout,
        without_role,
    )


def _residual_code(options: SplitOptions, method: Method, info: TensorInfo) -> str:
    if options.residual_dtype != "auto":
        return dtype_code(getattr(torch, options.residual_dtype))
    if method.residual_dtype is not None:
        return dtype_code(getattr(torch, method.residual_dtype))
    return info.dtype


def _refuse_partial_layout(name: str, layout: Layout, source: TensorSource) -> None:
    """Refuse a given layout of whose roles the checkpoint lacks one.

    In a mixture of experts either an expert's matrix or that of a dense layer is enough.
    """
    known = {
        part
        for slot in layout.slots(source.infos).values()
        for part in slot.role.rpartition(".")[2].split("_")
    }
    if missing := [role for role in layout.roles if not known.issuperset(role.rpartition(".")[2].split("_"))]:
        raise TargetError(
            f"layout {name} does not fit the checkpoint: it has no tensor for {', '.join(missing)}; "
            "add a layout for this family, which is one file (see the README)"
        )


def _matrices_without_role(
    model: OpenModel, layout: Layout, infos: Mapping[str, TensorInfo]
) -> tuple[str, ...]:
    """Matrices of the repeated blocks that a layout of other models does not know; "*" for numbers."""
    if model.config.get("model_type") in layout.model_types or layout.signature_tensor in infos:
        return ()
    slots = layout.slots(infos)
    blocks = {name.partition(f".{slot.layer}.")[0] for name, slot in slots.items()}
    left = [
        info.name
        for info in infos.values()
        if len(info.shape) == 2 and info.name not in slots and _NUMBER.split(info.name)[0] in blocks
    ]
    return tuple(dict.fromkeys(_NUMBER.sub(".*.", name) for name in left))


def _refuse_unsuitable(infos: Mapping[str, TensorInfo], scaled: Mapping[str, Scaling]) -> None:
    chosen = [infos[name] for name in scaled]
    if unreal := [info for info in chosen if info.dtype not in REAL]:
        raise TargetError(
            f"{unreal[0].name} is stored as {unreal[0].dtype}, which cannot be decomposed "
            f"({len(unreal)} such); "
            "convert the checkpoint to bfloat16, float16 or float32 first"
        )
    if shapeless := [info for info in chosen if len(info.shape) != 2 or 0 in info.shape]:
        raise TargetError(
            f"{shapeless[0].name} has the shape {shapeless[0].shape} and is not a matrix; "
            "choose other targets"
        )
    if small := [info for info in chosen if min(info.shape) < scaled[info.name].rank]:
        rank = max(scaled[info.name].rank for info in small)
        shapes = ", ".join(f"{info.name} {info.shape}" for info in small[:3])
        most = min(min(info.shape) for info in small)
        raise TargetError(
            f"rank {rank} is above what {len(small)} of {len(chosen)} targets have: {shapes}; "
            f"give --rank {most} or less, or other --targets"
        )


def decompose_work(plan: DecomposePlan, device: torch.device) -> TensorJob:
    """How each tensor of the source is processed: split, copied, or only read for its checksum."""
    copies = {info.name: file.path for file in plan.shards for info in file.units}
    order = list(copies) or list(plan.infos)
    count = matrices_at_once(plan, device)

    def compute(name: str, stored: Tensor) -> TensorResult:
        factors, base, matrix = split_tensor(plan, name, stored, alone=count == 1)
        tensors = {
            (piece.file, key(piece.module, factor)): tensor
            for piece in plan.adapter.pieces[name]
            for factor, tensor in piece.of(factors).pieces().items()
        }
        if name in copies:
            tensors[copies[name], name] = base
        return TensorResult(tensors, asdict(matrix))

    return TensorJob(
        order=order,
        matrices=plan.slots,
        compute=compute,
        copies=copies,
        device=device,
        parallelism=count,
    )


def matrices_at_once(plan: DecomposePlan, device: torch.device) -> int:
    """How many matrices are split at the same time; one with LAPACK, which needs the memory of several."""
    return parallel_matrices(device) if plan.method.parallel and plan.options.svd == "fast" else 1


def split_tensor(
    plan: DecomposePlan, name: str, stored: Tensor, *, alone: bool
) -> tuple[Factors, Tensor, Matrix]:
    """(factors as stored, the base's matrix or its residual, measurements) of the matrix `name`.

    `stored` and what becomes of it are (O, I), or (I, O) if the files have the matrix so. If the dtype stays
    the same, the residual may overwrite `stored`, which must not be used afterwards.

    The factors are rounded first and the residual is computed from the rounded factors, so the only error is
    the single rounding of the residual. Raises TargetError if the matrix contains NaN or Inf.
    """
    slot = plan.slots[name]
    info = plan.infos[name]
    options = plan.options
    rank = plan.scalings[name].rank
    scale = plan.scalings[name].scale
    norm = _finite_norm(name, stored)
    solver = Solver(name, options.svd, options.tol, options.seed, alone)
    assert plan.method.split is not None, "plan_decomposition refuses methods without an adapter"
    transposed = slot.place is not None and slot.place.transposed
    weight_OI = stored.T.contiguous() if transposed else stored
    split = plan.method.split(weight_OI, rank, scale, solver)
    factors = split.factors.to(getattr(torch, options.dtype))
    base = stored
    error = 0.0
    if plan.method.residual:
        base, lost = residual_(weight_OI, factors, scale, torch_dtype(plan.residual_dtype(name)))
        base = base.T.contiguous() if transposed else base
        error = lost / norm if norm > 0 else 0.0
    matrix = Matrix(
        module=slot.module,
        role=slot.role,
        place=slot.place,
        shape=matrix_shape(info, slot),
        dtype=info.dtype,
        rank=rank,
        scale=scale,
        error=error,
        **(_measured(split.spectrum) if split.spectrum else {}),
    )
    return factors, base, matrix


def _measured(spectrum: Spectrum) -> dict[str, Any]:
    return {
        "sigma_first": spectrum.first,
        "sigma_last": spectrum.last,
        "energy": spectrum.energy,
        "excess": spectrum.excess,
        "engine": spectrum.engine,
    }


def _finite_norm(name: str, weight_OI: Tensor) -> float:
    """The Frobenius norm of a matrix. Raises TargetError if it contains NaN or Inf."""
    norm = sqrt(total_energy(weight_OI))
    # The norm needs one cheap pass; the values are only examined if it is not finite.
    if not isfinite(norm) and not weight_OI.isfinite().all():
        count = int((~weight_OI.isfinite()).sum())
        raise TargetError(
            f"{name} holds {count} values that are NaN or Inf; repair the checkpoint "
            "or leave the tensor out of --targets"
        )
    return norm


@dataclass(frozen=True)
class DecomposeJob:
    """The decomposition of one model."""

    model: OpenModel
    plan: DecomposePlan
    command: str = "decompose"

    @property
    def options(self) -> SplitOptions:
        """The options as the user gave them."""
        return self.plan.options

    @property
    def files(self) -> list[PlannedFile]:
        """The shards of the residual, the initial adapter, and what it is put together from."""
        return [*self.plan.shards, *self.plan.adapter.files]

    @property
    def inputs(self) -> list[Path]:
        """The model."""
        return [self.model.path]

    def identity(self) -> dict[str, Any]:
        """The model."""
        return {"model": self.model.identity()}

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Decompose or copy every tensor, then put the factors of experts together."""
        device = pick_device(run.device, run.ranks.local)
        source = self.plan.layout_in_use.divided(self.model.source)
        stream(decompose_work(self.plan, device), source, staged, run)
        if run.ranks.leads:
            stack_experts(self.plan.adapter, staged)

    def write_sidecars(self, directory: Path) -> None:
        """The model's sidecars if its weights were written, and the adapter's configuration."""
        if self.plan.shards:
            complete_checkpoint(self.model.path, directory, self.plan.shards)
        (directory / self.plan.folder / ADAPTER_CONFIG).write_text(self.plan.adapter.config.text())

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the decomposed directory."""
        measured = notes(staged, self.plan.slots)
        return Manifest(
            kind="decomposed",
            layout=self.plan.layout,
            method=self.options.method,
            base=self.model.origin(source_checksums(staged)),
            base_is_residual=self.plan.method.residual,
            options=asdict(self.options),
            matrices={name: Matrix(**note) for name, note in measured.items()},
            files=file_checksums(staged),
            roles=roles_of(self.files),
            threads=threads,
        )

    def remarks(self, manifest: Manifest) -> tuple[str, ...]:
        """Which matrices a borrowed layout left out."""
        return self.plan.remarks
