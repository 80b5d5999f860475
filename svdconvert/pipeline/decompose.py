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
from svdconvert.adapters.adapter_config import PER_EXPERT, AdapterConfig
from svdconvert.adapters.peft_files import WEIGHTS, adapter_infos, key, target_modules
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, dtype_code, torch_dtype
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import TargetError
from svdconvert.inputs.model import OpenModel
from svdconvert.layouts.base import LAYOUTS, Layout, Slot
from svdconvert.linalg.blocks import total_energy
from svdconvert.linalg.delta import residual_
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.threads import parallel_matrices, pick_device
from svdconvert.linalg.triplets import Spectrum
from svdconvert.manifest.schema import Manifest, Matrix, roles_of
from svdconvert.methods.base import METHODS, Method, init_folder
from svdconvert.output.plan import PlannedFile, plan_file, plan_shards
from svdconvert.output.sidecars import complete_checkpoint
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.effects import refuse_idle_options
from svdconvert.pipeline.runner import (
    TensorJob,
    TensorResult,
    file_checksums,
    notes,
    source_checksums,
    stream,
)
from svdconvert.pipeline.scaling import Scaling, as_pattern, scalings

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
    shards: tuple[PlannedFile, ...]
    adapter: PlannedFile
    without_role: tuple[str, ...] = ()
    """Matrices of the repeated blocks that the layout does not know and that stay as they are."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the plan."""
        if not self.without_role:
            return ()
        return (
            f"layout {self.layout} has no role for {', '.join(self.without_role[:8])} "
            f"({len(self.without_role)} such names): these matrices stay as they are",
        )

    @property
    def folder(self) -> str:
        """The folder of the initial adapter."""
        return init_folder(self.options.method)

    @property
    def per_expert(self) -> bool:
        """True if single experts of a mixture are adapted."""
        return any(slot.expert is not None for slot in self.slots.values())

    @property
    def files(self) -> list[PlannedFile]:
        """All files of tensors that are written."""
        return [*self.shards, self.adapter]

    def residual_dtype(self, name: str) -> str:
        """The element type of the residual of the tensor `name`."""
        return _residual_code(self.options, self.method, self.infos[name])

    def adapter_config(self) -> AdapterConfig:
        """The configuration of the initial adapter."""
        linears = {name.removesuffix(".weight") for name, info in self.infos.items() if len(info.shape) == 2}
        chosen = {slot.name.removesuffix(".weight"): slot.module for slot in self.slots.values()}
        others = linears - set(chosen)
        rank = self.options.rank
        alpha = float(self.options.alpha or self.options.rank)
        ranks = {slot.module: self.scalings[name].rank for name, slot in self.slots.items()}
        alphas = {slot.module: self.scalings[name].alpha for name, slot in self.slots.items()}
        return AdapterConfig(
            rank=rank,
            alpha=alpha,
            targets=target_modules(chosen.values(), [*chosen.values(), *others]),
            peft_type=PER_EXPERT if self.per_expert else self.method.peft_type,
            base_is_residual=self.method.residual,
            rslora=self.options.rslora,
            rank_pattern=as_pattern(ranks, rank),
            alpha_pattern=as_pattern(alphas, alpha),
            dropout=self.options.dropout,
            task=LAYOUTS.get(self.layout).task_of(self.infos),
        )


def plan_decomposition(model: OpenModel, options: SplitOptions) -> DecomposePlan:
    """Plan from headers. Raises TargetError if a target cannot be decomposed."""
    layout_name, layout = model.layout(options.layout)
    source = model.source
    method = METHODS.get(options.method).variant(options.init)
    if method.split is None:
        raise TargetError(
            f"{options.method} trains the weights themselves and has nothing to decompose; "
            f"use svdconvert train MODEL --method {options.method}"
        )
    refuse_idle_options(method, options)
    model.refuse_unknown_format()
    slots = layout.select(source.infos, options.targets)
    if options.layout is not None:
        _refuse_partial_layout(layout_name, layout, source)
    scaled = scalings(layout, source.infos, slots, options)
    model.refuse_codes(scaled)
    _refuse_unsuitable(source.infos, scaled)
    outputs = [
        replace(info, dtype=_residual_code(options, method, info))
        if name in slots and method.residual
        else info
        for name, info in source.infos.items()
    ]
    keep = method.residual or options.copy_base
    shards = plan_shards(outputs, parse_size(options.max_shard_size)) if keep else []
    dtype = dtype_code(getattr(torch, options.dtype))
    pieces: list[TensorInfo] = []
    for tensor, slot in slots.items():
        rows, columns = source.infos[tensor].shape
        pieces += adapter_infos(slot.module, method.factor_shapes(rows, columns, scaled[tensor].rank), dtype)
    adapter = plan_file(f"{init_folder(options.method)}/{WEIGHTS}", pieces, "initial_adapter")
    without_role = _matrices_without_role(model, layout)
    return DecomposePlan(
        method, layout_name, options, slots, scaled, source.infos, tuple(shards), adapter, without_role
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
    known = {slot.role.rpartition(".")[2] for slot in layout.slots(source.infos).values()}
    if missing := [role for role in layout.roles if role.rpartition(".")[2] not in known]:
        raise TargetError(
            f"layout {name} does not fit the checkpoint: it has no tensor for {', '.join(missing)}; "
            "add a layout for this family, which is one file (see the README)"
        )


def _matrices_without_role(model: OpenModel, layout: Layout) -> tuple[str, ...]:
    """Matrices of the repeated blocks that a layout of other models does not know; "*" for numbers."""
    infos = model.source.infos
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
    copies = {info.name: file.path for file in plan.shards for info in file.infos}
    order = list(copies) or list(plan.infos)
    count = matrices_at_once(plan, device)

    def compute(name: str, stored: Tensor) -> TensorResult:
        factors, base_OI, matrix = split_tensor(plan, name, stored, alone=count == 1)
        tensors = {
            (plan.adapter.path, key(matrix.module, piece)): part for piece, part in factors.pieces().items()
        }
        if name in copies:
            tensors[copies[name], name] = base_OI
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
    """(factors as stored, the base's matrix (O, I) or its residual, measurements) of the matrix `name`.

    If the dtype stays the same, the residual overwrites `stored` (O, I), which must not be used afterwards.

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
    split = plan.method.split(stored, rank, scale, solver)
    factors = split.factors.to(getattr(torch, options.dtype))
    base_OI = stored.to(torch_dtype(info.dtype))  # a decoded matrix is computed with in float32
    error = 0.0
    if plan.method.residual:
        base_OI, lost = residual_(stored, factors, scale, torch_dtype(plan.residual_dtype(name)))
        error = lost / norm if norm > 0 else 0.0
    matrix = Matrix(
        module=slot.module,
        role=slot.role,
        shape=(info.shape[0], info.shape[1]),
        dtype=info.dtype,
        rank=rank,
        scale=scale,
        error=error,
        **(_measured(split.spectrum) if split.spectrum else {}),
    )
    return factors, base_OI, matrix


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
        """The shards of the residual, and the initial adapter."""
        return self.plan.files

    @property
    def inputs(self) -> list[Path]:
        """The model."""
        return [self.model.path]

    def identity(self) -> dict[str, Any]:
        """The model."""
        return {"model": self.model.identity()}

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Decompose or copy every tensor."""
        device = pick_device(run.device, run.ranks.local)
        stream(decompose_work(self.plan, device), self.model.source, staged, run)

    def write_sidecars(self, directory: Path) -> None:
        """The model's sidecars if its weights were written, and the adapter's configuration."""
        if self.plan.shards:
            complete_checkpoint(
                self.model.path, directory, self.plan.shards, was_decoded=self.model.is_decoded
            )
        (directory / self.plan.folder / ADAPTER_CONFIG).write_text(self.plan.adapter_config().text())

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
