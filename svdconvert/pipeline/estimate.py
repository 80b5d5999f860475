"""What a decomposition would take: from headers alone, and one short measurement of the machine."""

from collections import Counter
from dataclasses import dataclass
from time import perf_counter

import torch

from svdconvert.linalg.gemm import product
from svdconvert.linalg.krylov import block_width, first_width
from svdconvert.linalg.threads import worker_pool
from svdconvert.linalg.truncated import POWERS
from svdconvert.pipeline.decompose import DecomposePlan, matrices_at_once

_GROWN = 2  # blocks that the fast engine adds to its first space for trained weights, about
_DISK = 500e6  # bytes per second, a modest disk
_START = 2.5  # seconds to import torch
_BARE = 170_000_000  # bytes of the program with torch, before it reads anything


@dataclass(frozen=True)
class Row:
    """The matrices of one role."""

    role: str
    shape: tuple[int, int]
    rank: int
    count: int
    parameters: int


@dataclass(frozen=True)
class Estimate:
    """A decomposition before it is done. Sizes in bytes, time in seconds."""

    rows: list[Row]
    read: int
    written: int
    files: list[str]
    memory: int
    seconds: float
    remarks: tuple[str, ...] = ()
    """What the user should know of the plan."""


def estimate_decompose(plan: DecomposePlan) -> Estimate:
    """Sizes are exact, memory and time are estimates."""
    groups = Counter(
        (slot.role, _shape(plan, name), plan.scalings[name].rank) for name, slot in plan.slots.items()
    )
    rows = [
        Row(role, shape, rank, count, count * plan.method.trained_values(*shape, rank))
        for (role, shape, rank), count in groups.items()
    ]
    read = sum(info.nbytes for info in plan.infos.values())
    written = sum(file.nbytes for file in plan.files)
    exact = plan.options.svd != "fast" or plan.method.slice in ("middle", "random")
    work = sum(row.count * _flops(*row.shape, row.rank, exact=exact) for row in rows)
    work *= 2 if plan.options.svd == "exact64" else 1  # units of float64 are half as many
    return Estimate(
        rows=sorted(rows, key=lambda row: (row.role, row.rank)),
        read=read,
        written=written,
        files=[file.path for file in plan.files],
        memory=_BARE + _matrices_in_memory(plan, exact=exact),
        seconds=_START + work / _speed(plan) + (read + written) / _DISK,
        remarks=plan.remarks,
    )


def _matrices_in_memory(plan: DecomposePlan, *, exact: bool) -> int:
    """Those being read, in work and being written, as stored, and what the engine makes of one in work."""
    stored = max(plan.infos[name].nbytes for name in plan.slots)
    wide = max(rows * columns for rows, columns in (_shape(plan, name) for name in plan.slots))
    wide *= 8 if plan.options.svd == "exact64" else 4
    count = matrices_at_once(plan, torch.device("cpu"))
    return (count + 2) * stored + (9 * wide if exact else count * wide)


def _shape(plan: DecomposePlan, name: str) -> tuple[int, int]:
    rows, columns = plan.infos[name].shape
    return rows, columns


def _flops(rows: int, columns: int, rank: int, *, exact: bool) -> float:
    long, short = max(rows, columns), min(rows, columns)
    if exact:
        return 4.0 * long * short**2 + 22.0 * short**3
    block = block_width(rank)
    searched = first_width(rank) + (POWERS + _GROWN) * block
    return 4.0 * rows * columns * (searched + rank)  # the last: the factors and the residual


def _speed(plan: DecomposePlan) -> float:
    """Floating-point operations per second of the matrices at once, with their share of the threads."""
    count = matrices_at_once(plan, torch.device("cpu"))
    with worker_pool(count) as pool:
        return count * pool.submit(_flops_per_second).result()


def _flops_per_second() -> float:
    """The best of some thin float32 products, a few milliseconds long: what disturbs one is no measure."""
    wide, thin = torch.ones(1024, 1024), torch.ones(1024, 64)
    seconds = []
    for _ in range(6):
        start = perf_counter()
        product(wide, thin)
        seconds.append(perf_counter() - start)
    return 2.0 * 1024 * 1024 * 64 / min(seconds)
