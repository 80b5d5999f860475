"""What a decomposition would take: from headers alone, and one short measurement of the machine."""

from collections import Counter
from dataclasses import dataclass
from time import perf_counter

import torch

from svdconvert.artifact.split import SplitPlan
from svdconvert.linalg.truncated import OVERSAMPLING

_SWEEPS = 8  # what the fast engine needs on trained weights, about
_DISK = 500e6  # bytes per second, a modest disk
_START = 2.5  # seconds to import torch


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


def estimate(plan: SplitPlan) -> Estimate:
    """Sizes are exact, memory and time are estimates."""
    groups = Counter(
        (slot.role, _shape(plan, name), plan.scalings[name].rank) for name, slot in plan.slots.items()
    )
    rows = [
        Row(role, shape, rank, count, count * plan.method.trained_values(*shape, rank))
        for (role, shape, rank), count in groups.items()
    ]
    shapes = [_shape(plan, name) for name in plan.slots]
    read = sum(info.nbytes for info in plan.infos.values())
    written = sum(file.nbytes for file in plan.files)
    largest = max(rows * columns for rows, columns in shapes) * 4
    exact = plan.options.svd == "exact" or plan.method.slice in ("middle", "random")
    work = sum(row.count * _flops(*row.shape, row.rank, exact=exact) for row in rows)
    return Estimate(
        rows=sorted(rows, key=lambda row: (row.role, row.rank)),
        read=read,
        written=written,
        files=[file.path for file in plan.files],
        memory=300_000_000 + largest * (10 if exact else 4),
        seconds=_START + work / _flops_per_second() + (read + written) / _DISK,
    )


def _shape(plan: SplitPlan, name: str) -> tuple[int, int]:
    rows, columns = plan.infos[name].shape
    return rows, columns


def _flops(rows: int, columns: int, rank: int, *, exact: bool) -> float:
    long, short = max(rows, columns), min(rows, columns)
    if exact:
        return 4.0 * long * short**2 + 22.0 * short**3
    return 4.0 * rows * columns * (rank + OVERSAMPLING) * (_SWEEPS + 1)


def _flops_per_second() -> float:
    """A thin float32 product of this machine, a few milliseconds long."""
    wide, thin = torch.ones(1024, 1024), torch.ones(1024, 64)
    wide @ thin
    start = perf_counter()
    for _ in range(4):
        wide @ thin
    return 4 * 2.0 * 1024 * 1024 * 64 / (perf_counter() - start)
