"""Ways to find the top slice of one matrix at equal accuracy: columns, flops, milliseconds, error.

    python benchmarks/engines.py [--rows 5632] [--columns 2048] [--rank 128] [--threads 1]
        [--shapes [--dtype float32]]

Every way runs until its residual is within --tol of the optimum (computed here from eigenvalues), so that all
have the same accuracy; the last line is the engine of svdconvert, which estimates its own error. The time is
CPU time (of one thread by default), which other processes hardly change. --shapes instead prints what a
decomposition costs per element and unit of rank for matrices of many shapes, each followed by its transpose.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from models import trained_matrix
from rich.console import Console
from rich.table import Table
from torch import Tensor

from svdconvert.linalg.blocks import gram_times, low_gram_times
from svdconvert.linalg.delta import merged_, residual_
from svdconvert.linalg.krylov import Krylov, warm_start
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.truncated import fast_top
from svdconvert.methods.base import split_sigma_evenly

SHAPES = ((11008, 4096), (4096, 4096), (14336, 4096), (5632, 2048), (2048, 2048), (8192, 1024), (1536, 576))
STEPS = ("top slice", "minor slice", "residual", "merge")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5632)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.shapes:
        shapes(arguments.rank, getattr(torch, arguments.dtype))
        return
    weight = trained_matrix(arguments.rows, arguments.columns, torch.Generator().manual_seed(0)).float()
    trial = Trial(weight, arguments.rank, arguments.tol)
    table = Table(title=f"{arguments.rows} x {arguments.columns}, rank {arguments.rank}")
    for head in ("way", "sweeps in", "columns", "GFLOP", "ms", "above the optimum"):
        table.add_column(head, justify="left" if head == "way" else "right")
    for row in trial.rows():
        table.add_row(*row)
    Console().print(table)


def shapes(rank: int, dtype: torch.dtype) -> None:
    """Print the CPU time of each step, and its ratio to that of the transposed shape."""
    table = Table(
        title=f"rank {rank}, {dtype}: picoseconds per element and unit of rank (ratio to the transpose)"
    )
    for head in ("shape", *STEPS):
        table.add_column(head, justify="right")
    for shape in SHAPES:
        sides = (shape,) if shape[0] == shape[1] else (shape, shape[::-1])
        found = [cost(rows, columns, rank, dtype) for rows, columns in sides]
        for place, each in enumerate(found):
            other = found[-1 - place]
            cells = [f"{each[step]:.0f} ({each[step] / other[step]:.2f})" for step in STEPS]
            table.add_row(" x ".join(map(str, sides[place])), *cells)
    Console().print(table)


def cost(rows: int, columns: int, rank: int, dtype: torch.dtype) -> dict[str, float]:
    """By step: the fastest of three, in picoseconds per element and unit of rank."""
    weight = trained_matrix(rows, columns, torch.Generator().manual_seed(0))
    if dtype != torch.bfloat16:
        weight = (weight.float() * 1.001).to(dtype)  # numbers that bfloat16 cannot hold
    solver = Solver("weight", tol=6e-3)
    factors = split_sigma_evenly(solver.top(weight, rank), 1.0).factors.to(torch.float32)
    steps: dict[str, Callable[[Tensor], object]] = {
        "top slice": lambda matrix: solver.top(matrix, rank),
        "minor slice": lambda matrix: solver.bottom(matrix, rank),
        "residual": lambda matrix: residual_(matrix, factors, 1.0, dtype),
        "merge": lambda matrix: merged_(matrix, factors.folded(), dtype),
    }
    found = {}
    for name in STEPS:
        seconds = []
        for _ in range(3):
            copy = weight.clone()
            started = time.thread_time()
            steps[name](copy)
            seconds.append(time.thread_time() - started)
        found[name] = min(seconds) * 1e12 / weight.numel() / rank
    return found


class Trial:
    """One matrix and its optimum."""

    def __init__(self, weight_LS: Tensor, rank: int, tol: float) -> None:
        wide = weight_LS.double()
        values = torch.linalg.eigvalsh(wide.T @ wide).flip(0)
        self.weight_LS = weight_LS
        self.rank = rank
        self.tol = tol
        self.total = float(values.sum())
        self.best = float(values[rank:].sum())
        self.low = {torch.float32: weight_LS, torch.bfloat16: weight_LS.bfloat16()}

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Every way, with both dtypes of the sweeps."""
        for dtype in (torch.float32, torch.bfloat16):
            yield self._row("subspace iteration, rank columns (PEFT's)", dtype, self.rank, subspace=True)
            yield self._row("subspace iteration, 16 columns more", dtype, self.rank + 16, subspace=True)
            yield self._row("Krylov, 144 columns a block, no powers", dtype, self.rank + 16, powers=0)
            yield self._row("Krylov, 64 columns a block, no powers", dtype, 64, powers=0)
            yield self._row("Krylov, 64 columns a block, 4 powers", dtype, 64, powers=4)
            yield self._row("Krylov, 48 columns a block, 3 powers", dtype, 48, powers=3)
            yield self._row("Krylov, 32 columns a block, 4 powers", dtype, 32, powers=4)
        started = time.thread_time()
        found = fast_top(self.weight_LS, self.rank, tol=self.tol, generator=self._generator())
        milliseconds = (time.thread_time() - started) * 1e3
        assert found is not None
        outside = (1.0 - found.spectrum.energy) * self.total
        error = (outside / self.best) ** 0.5 - 1.0
        yield (
            "svdconvert",
            "",
            "",
            "",
            f"{milliseconds:.0f}",
            f"{error:.1e} ({found.spectrum.excess:.1e} claimed)",
        )

    def _row(
        self, name: str, dtype: torch.dtype, width: int, *, powers: int = 0, subspace: bool = False
    ) -> tuple[str, ...]:
        start = torch.randn(self.weight_LS.shape[1], width, generator=self._generator())
        attempts = range(2, 41)
        for steps in attempts:
            self.columns = 0
            started = time.thread_time()
            basis = (
                self._iterated(start, steps, dtype) if subspace else self._space(start, steps, powers, dtype)
            )
            projected = self.weight_LS @ basis
            milliseconds = (time.thread_time() - started) * 1e3
            outside = self.total - float(projected.double().square().sum())
            error = (outside / self.best) ** 0.5 - 1.0
            if error < self.tol:
                break
        flops = 2e-9 * self.weight_LS.numel() * (self.columns + self.rank)
        columns = f"{self.columns} + {self.rank}"
        return name, str(dtype)[6:], columns, f"{flops:.1f}", f"{milliseconds:.0f}", f"{error:.1e}"

    def _iterated(self, start: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
        """Householder QR after every sweep, then Rayleigh-Ritz, as torch.svd_lowrank does."""
        block = start
        low = self.low[dtype]
        for _ in range(steps):
            self.columns += 2 * block.shape[1]
            block = torch.linalg.qr((low.T @ (low @ block.to(dtype))).float() / self.total).Q
        core = torch.linalg.eigh((self.weight_LS @ block).T @ (self.weight_LS @ block))
        self.columns += block.shape[1]
        return block @ core.eigenvectors[:, -self.rank :]

    def _space(self, start: Tensor, steps: int, powers: int, dtype: torch.dtype) -> Tensor:
        def apply(block: Tensor) -> Tensor:
            self.columns += 2 * block.shape[1]
            times = gram_times if dtype == torch.float32 else low_gram_times
            return times(self.low[dtype], block) / self.total

        blocks = -(-self.rank // start.shape[1]) + steps - 1
        krylov = Krylov(apply, warm_start(apply, start, powers), blocks * start.shape[1])
        krylov.grow(blocks)
        return torch.linalg.qr(krylov.vectors(krylov.ritz(self.rank))).Q

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)


if __name__ == "__main__":
    main()
