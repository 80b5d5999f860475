"""Size, memory and time of a decomposition, estimated from headers and a short speed measurement."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from time import perf_counter

import torch

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.linalg.gemm import matmul_f32
from svdconvert.linalg.krylov import block_width, first_width
from svdconvert.linalg.operators import POWERS
from svdconvert.linalg.threads import worker_pool
from svdconvert.methods.base import Work
from svdconvert.pipeline.adapter_targets import matrix_shape
from svdconvert.pipeline.decompose import matrices_at_once
from svdconvert.pipeline.decompose_plan import DecomposePlan
from svdconvert.pipeline.quantised_start import starts_of

_ADDED_BLOCKS = 2  # that the fast engine adds to its first space for trained weights, approximately
_DISK_SPEED = 500e6  # bytes per second, of a slow SSD
_IMPORT_SECONDS = 2.5  # to import torch
_BLOCK_MEMORY = 40_000_000  # bytes for some rows of several tensors
_BASE_MEMORY = 170_000_000  # bytes of the process with torch imported, before it reads anything


@dataclass(frozen=True)
class Row:
    """The matrices of one role, shape and rank."""

    role: str
    shape: tuple[int, int]
    rank: int
    count: int
    parameters: int


@dataclass(frozen=True)
class Estimate:
    """What a decomposition will read, write and need. Sizes in bytes, time in seconds."""

    rows: list[Row]
    read: int
    written: int
    files: list[str]
    memory: int
    seconds: float
    remarks: tuple[str, ...] = ()
    """What the user should know of the plan."""


def estimate_decompose(plan: DecomposePlan) -> Estimate:
    """Estimate a decomposition: sizes are exact, memory and time approximate."""
    groups = Counter(
        (slot.role, _shape(plan, name), plan.scalings[name].rank) for name, slot in plan.slots.items()
    )
    rows = [
        Row(role, shape, rank, count, count * plan.method.trained_values(*shape, rank))
        for (role, shape, rank), count in groups.items()
    ]
    read = sum(info.nbytes for info in plan.infos.values())
    written = sum(file.nbytes for file in plan.files)
    work = _work(plan)
    flops = sum(row.count * _flops_of_start(plan, row, work) for row in rows)
    flops *= 2 if plan.options.svd == "exact64" else 1  # float64 runs at half the speed
    return Estimate(
        rows=sorted(rows, key=lambda row: (row.role, row.rank)),
        read=read,
        written=written,
        files=[file.path for file in plan.files],
        memory=_BASE_MEMORY + _matrices_in_memory(plan, work),
        seconds=_IMPORT_SECONDS + flops / _speed(plan) + (read + written) / _DISK_SPEED,
        remarks=plan.remarks,
    )


def memory_of_tensors(infos: Iterable[TensorInfo], count: int) -> int:
    """Bytes of a process that holds `count` of the largest tensors as stored and as many in float32."""
    largest = max((info.nbytes + 4 * prod(info.shape) for info in infos), default=0)
    return _BASE_MEMORY + count * largest


def memory_of_blocks(infos: Iterable[TensorInfo], count: int) -> int:
    """Bytes of a process that holds `count` of the largest tensors as stored, and some rows in float32."""
    return _BASE_MEMORY + _BLOCK_MEMORY + count * max((info.nbytes for info in infos), default=0)


def copy_seconds(nbytes: int) -> float:
    """To read and write so many bytes, with little arithmetic."""
    return _IMPORT_SECONDS + nbytes / _DISK_SPEED


def _flops_of_start(plan: DecomposePlan, row: Row, work: Work) -> float:
    """The split of a matrix and, for a residual in 4 bits, the truncated SVDs that follow it."""
    starts = starts_of(plan.method, plan.options.quant_start) if plan.quantised else ()
    search: Work = "search" if plan.options.svd == "fast" else "full"
    searches = len(starts) * plan.options.quant_iterations
    splits = 0 if starts == ("loftq",) else 1
    return splits * _flops(*row.shape, row.rank, work) + searches * _flops(*row.shape, row.rank, search)


def _work(plan: DecomposePlan) -> Work:
    """What a split costs; LAPACK computes a full SVD instead of searching for the triplets."""
    full_svd = plan.method.work == "search" and plan.options.svd != "fast"
    return "full" if full_svd else plan.method.work


def _matrices_in_memory(plan: DecomposePlan, work: Work) -> int:
    """Bytes of the matrices that are in memory at the same time, and of the working copies of a split."""
    largest = max(rows * columns for rows, columns in (_shape(plan, name) for name in plan.slots))
    stored = 4 * largest if plan.decoded else max(plan.infos[name].nbytes for name in plan.slots)
    copy = largest * (8 if plan.options.svd == "exact64" else 4)
    count = matrices_at_once(plan, torch.device("cpu"))
    rest = count * largest * 6 if plan.quantised else 0  # W - Q in float32, and two residuals in 4 bits
    return (count + 2) * stored + rest + (9 * copy if work == "full" else count * copy)


def _shape(plan: DecomposePlan, name: str) -> tuple[int, int]:
    return matrix_shape(plan.infos[name], plan.slots[name])


def _flops(rows: int, columns: int, rank: int, work: Work) -> float:
    """Approximate floating-point operations of one split in float32."""
    long = max(rows, columns)
    short = min(rows, columns)
    if work == "full":
        return 4.0 * long * short**2 + 22.0 * short**3
    if work == "thin":
        return 4.0 * rows * columns * rank
    block = block_width(rank)
    columns_of_space = first_width(rank) + (POWERS + _ADDED_BLOCKS) * block
    # The second term is for the factors and the residual.
    return 4.0 * rows * columns * (columns_of_space + rank)


def _speed(plan: DecomposePlan) -> float:
    """Floating-point operations per second, summed over the matrices that are split at the same time."""
    count = matrices_at_once(plan, torch.device("cpu"))
    with worker_pool(count) as pool:
        return count * pool.submit(_flops_per_second).result()


def _flops_per_second() -> float:
    """Measured as the fastest of six thin float32 products of a few milliseconds each."""
    wide = torch.ones(1024, 1024)
    thin = torch.ones(1024, 64)
    seconds = []
    for _ in range(6):
        start = perf_counter()
        matmul_f32(wide, thin)
        seconds.append(perf_counter() - start)
    return 2.0 * 1024 * 1024 * 64 / min(seconds)
