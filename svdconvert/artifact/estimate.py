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
    shape: tuple[int, ...]
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
    rank = plan.options.rank
    groups = Counter((slot.role, plan.infos[name].shape) for name, slot in plan.slots.items())
    rows = [Row(role, shape, count, count * rank * sum(shape)) for (role, shape), count in groups.items()]
    shapes = [plan.infos[name].shape for name in plan.slots]
    read = sum(info.nbytes for info in plan.infos.values())
    written = sum(file.nbytes for file in plan.files)
    largest = max(rows * columns for rows, columns in shapes) * 4
    work = sum(_flops(rows, columns, rank, exact=plan.options.svd == "exact") for rows, columns in shapes)
    return Estimate(
        rows=sorted(rows, key=lambda row: row.role),
        read=read,
        written=written,
        files=[file.path for file in plan.files],
        memory=300_000_000 + largest * (10 if plan.options.svd == "exact" else 4),
        seconds=_START + work / _flops_per_second() + (read + written) / _DISK,
    )


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
