"""Split a checkpoint's matrices: planned from headers, then done one tensor at a time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from svdconvert.adapters.delta import subtract
from svdconvert.adapters.peft_format import WEIGHTS, AdapterConfig, adapter_infos, key, target_modules
from svdconvert.artifact.manifest import Matrix
from svdconvert.artifact.sizes import parse_size
from svdconvert.artifact.stream import Outcome, Work
from svdconvert.checkpoint.shards import PlannedFile, plan_file, plan_shards
from svdconvert.checkpoint.source import REAL, TensorInfo, TensorSource, dtype_code, torch_dtype
from svdconvert.errors import TargetError
from svdconvert.factors import Factors
from svdconvert.layout import ALL_LINEAR, Layout, Slot
from svdconvert.linalg.solver import Solver
from svdconvert.method import METHODS, Method, init_folder

FloatName = Literal["float32", "bfloat16", "float16"]


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SplitOptions:
    """Every option of `decompose` that shapes its result."""

    method: str = "pissa"
    """One of `svdconvert list methods`."""
    rank: Annotated[int, Field(ge=1)] = 64
    """Rank of every adapter matrix."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapter is scaled by alpha / rank; alpha is the rank unless given."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """all-linear, roles such as attn or mlp.down, or globs on tensor names."""
    svd: Literal["fast", "exact"] = "fast"
    """Randomised with a measured error, or LAPACK's full SVD."""
    tol: Annotated[float, Field(gt=0)] = 1e-3
    """How far the residual's norm may lie above the optimum, relatively, before LAPACK takes over."""
    dtype: FloatName = "float32"
    """In which the factors are stored."""
    residual_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In which the residual is stored; auto is the source's own."""
    max_shard_size: str = "5GB"
    """Size of an output shard."""
    copy_base: bool = False
    """Write the base too where the method leaves it as it is."""
    layout: str | None = None
    """One of `svdconvert list layouts`, where config.json does not say."""
    seed: int = 0
    """Of the random numbers."""


@dataclass(frozen=True)
class SplitPlan:
    """What will be written, known from headers alone."""

    method: Method
    options: SplitOptions
    slots: Mapping[str, Slot]
    infos: Mapping[str, TensorInfo]
    shards: tuple[PlannedFile, ...]
    adapter: PlannedFile

    @property
    def scale(self) -> float:
        """Of the adapter: alpha / rank."""
        return (self.options.alpha or self.options.rank) / self.options.rank

    @property
    def folder(self) -> str:
        """Of the initial adapter."""
        return init_folder(self.options.method)

    @property
    def files(self) -> list[PlannedFile]:
        """Everything that is laid out."""
        return [*self.shards, self.adapter]

    def residual_dtype(self, name: str) -> str:
        """Element type of a residual."""
        return _residual_code(self.options, self.method, self.infos[name])

    def adapter_config(self) -> AdapterConfig:
        """Of the initial adapter."""
        linears = {name.removesuffix(".weight") for name, info in self.infos.items() if len(info.shape) == 2}
        chosen = {slot.name.removesuffix(".weight"): slot.module for slot in self.slots.values()}
        others = linears - set(chosen)
        return AdapterConfig(
            rank=self.options.rank,
            alpha=self.options.alpha or self.options.rank,
            targets=target_modules(chosen.values(), [*chosen.values(), *others]),
            peft_type=self.method.peft_type,
        )


def plan_split(source: TensorSource, layout: Layout, options: SplitOptions) -> SplitPlan:
    """Plan from headers. Raises TargetError for what cannot be decomposed, all complaints at once."""
    method = METHODS.get(options.method)
    slots = layout.select(source.infos, options.targets)
    _refuse_unfit(source.infos, slots, options.rank)
    outputs = [
        replace(info, dtype=_residual_code(options, method, info)) if name in slots and method.residual else info
        for name, info in source.infos.items()
    ]
    keep = method.residual or options.copy_base
    shards = plan_shards(outputs, parse_size(options.max_shard_size)) if keep else []
    dtype = dtype_code(getattr(torch, options.dtype))
    pieces: list[TensorInfo] = []
    for name, slot in slots.items():
        rows, columns = source.infos[name].shape
        pieces += adapter_infos(slot.module, _piece_shapes(method, rows, columns, options.rank), dtype)
    adapter = plan_file(f"{init_folder(options.method)}/{WEIGHTS}", pieces)
    return SplitPlan(method, options, slots, source.infos, tuple(shards), adapter)


def _piece_shapes(method: Method, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
    core = {"lora_S": (rank,), "lora_R": (rank, rank)}
    shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, columns), "lora_B": (rows, rank)}
    return shapes | {piece: core[piece] for piece in method.trains if piece in core}


def _residual_code(options: SplitOptions, method: Method, info: TensorInfo) -> str:
    if options.residual_dtype != "auto":
        return dtype_code(getattr(torch, options.residual_dtype))
    return "F32" if method.minor else info.dtype


def _refuse_unfit(infos: Mapping[str, TensorInfo], slots: Mapping[str, Slot], rank: int) -> None:
    chosen = [infos[name] for name in slots]
    if odd := [info for info in chosen if info.dtype not in REAL]:
        raise TargetError(
            f"{odd[0].name} is stored as {odd[0].dtype}, which cannot be decomposed ({len(odd)} such targets); "
            "convert the checkpoint to bfloat16, float16 or float32 first"
        )
    if odd := [info for info in chosen if len(info.shape) != 2 or 0 in info.shape]:
        raise TargetError(f"{odd[0].name} has the shape {odd[0].shape} and is no matrix; choose other targets")
    if odd := [info for info in chosen if min(info.shape) < rank]:
        shapes = ", ".join(f"{info.name} {info.shape}" for info in odd[:3])
        most = min(min(info.shape) for info in odd)
        raise TargetError(
            f"rank {rank} is above what {len(odd)} of {len(chosen)} targets have: {shapes}; "
            f"give --rank {most} or less, or other --targets"
        )


def split_work(plan: SplitPlan, device: torch.device) -> Work:
    """How each tensor of the source is split, copied or only noted."""
    copies = {info.name: file.path for file in plan.shards for info in file.infos}
    order = list(copies) or list(plan.infos)
    return Work(
        order=order,
        matrices=plan.slots,
        compute=lambda name, tensor: _split_one(plan, name, tensor, copies.get(name), device),
        copies=copies,
    )


def _split_one(plan: SplitPlan, name: str, stored: Tensor, file: str | None, device: torch.device) -> Outcome:
    slot, options = plan.slots[name], plan.options
    weight_OI = stored.to(device, torch.float32)
    solver = Solver(name, options.svd, options.tol, options.seed)
    factors, row = split_matrix(plan.method, weight_OI, options, solver)
    tensors = {(plan.adapter.path, key(slot.module, piece)): tensor for piece, tensor in factors.pieces().items()}
    if plan.method.residual and file is not None:
        residual, row["error"] = _residual(weight_OI, factors, plan.scale, torch_dtype(plan.residual_dtype(name)))
        tensors[file, name] = residual
    elif file is not None:
        tensors[file, name] = stored
    info = plan.infos[name]
    matrix = Matrix(
        module=slot.module, role=slot.role, shape=(info.shape[0], info.shape[1]), dtype=info.dtype,
        rank=options.rank, scale=plan.scale, **row,
    )
    return Outcome({place: tensor.cpu() for place, tensor in tensors.items()}, asdict(matrix))


def split_matrix(
    method: Method, weight_OI: Tensor, options: SplitOptions, solver: Solver
) -> tuple[Factors, dict[str, Any]]:
    """The factors of one matrix in the dtype in which they are stored, and what was measured.

    Raises TargetError for a matrix that holds NaN or Inf.
    """
    norm = torch.linalg.vector_norm(weight_OI)
    if not norm.isfinite() and not weight_OI.isfinite().all():
        count = int((~weight_OI.isfinite()).sum())
        raise TargetError(
            f"{solver.name} holds {count} values that are NaN or Inf; repair the checkpoint or leave it out of --targets"
        )
    split = method.split(weight_OI, options.rank, (options.alpha or options.rank) / options.rank, solver)
    row: dict[str, Any] = {}
    if (spectrum := split.spectrum) is not None:
        row = {
            "sigma_first": spectrum.first, "sigma_last": spectrum.last, "energy": spectrum.energy,
            "excess": spectrum.excess, "engine": spectrum.engine,
        }
    return split.factors.to(getattr(torch, options.dtype)), row


def _residual(weight_OI: Tensor, factors: Factors, scale: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The residual as stored, and the relative error that its one rounding makes."""
    exact_OI = subtract(weight_OI, factors, scale)
    rounded_OI = exact_OI.to(dtype)
    lost = torch.linalg.vector_norm(exact_OI.sub_(rounded_OI))
    norm = torch.linalg.vector_norm(weight_OI)
    return rounded_OI, float(lost / norm) if norm > 0 else 0.0
