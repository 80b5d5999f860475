"""The estimated excess of truncations, compared with the true one by LAPACK in float64.

    python benchmarks/estimates.py [--model DIR] [--slice top bottom] [--seeds 3]

Every matrix is truncated at several ranks and tolerances, with several seeds, as it is stored (in bfloat16
numbers) and as float32 numbers that bfloat16 cannot represent. Without --model the matrices are random; of a
model some layers are taken. No ratio is computed if the true excess is of the size of float32's rounding
(below 1e-6, or a norm below 1e-7 of the matrix's).
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from models import trained_matrix
from rich.console import Console
from rich.table import Table
from torch import Tensor

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.linalg.krylov import space_needed
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.threads import multiplies_bfloat16

RANKS = (16, 32, 64, 128)
TOLERANCES = (1e-2, 3e-3, 1e-3, 1e-4, 1e-5)
ROUNDING = 1e-6
"""Smallest excess that float32 can show, relative to the optimum."""
LEAST = 1e-7
"""Smallest norm that float32 can show, relative to the matrix's."""


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=2, help="of the model, evenly spread")
    parser.add_argument("--slice", nargs="*", choices=["top", "bottom"], default=["top", "bottom"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = [
        trial
        for name, matrix in _matrices(arguments.model, arguments.layers)
        for trial in _trials(name, matrix, arguments.slice, range(arguments.seeds))
    ]
    Console().print(_table(found))
    judged = sorted((trial for trial in found if trial.ratio), key=lambda trial: trial.ratio or 0.0)
    for trial in (judged[0], judged[-1]):
        print(f"estimate {trial.ratio:.2f} times the truth: {trial}")


class Trial(NamedTuple):
    """One truncation."""

    name: str
    slice: str
    arithmetic: str
    rank: int
    tol: float
    seed: int
    engine: str
    estimate: float
    truth: float
    share: float
    """Norm of the optimal residual, relative to the matrix's."""

    @property
    def ratio(self) -> float | None:
        """Estimate over truth; None if float32 cannot show the truth, or the engine was exact."""
        seen = self.truth > ROUNDING and self.truth * self.share > LEAST
        return self.estimate / self.truth if seen and self.engine == "fast" else None


def _matrices(model: Path | None, layers: int) -> Iterator[tuple[str, Tensor]]:
    if model is None:
        generator = torch.Generator().manual_seed(0)
        for rows, columns in ((640, 512), (512, 900), (1024, 1024), (2816, 1024)):
            yield f"trained {rows} x {columns}", trained_matrix(rows, columns, generator)
        for kind, power in (("flat", 0.0), ("slow", 0.5), ("steep", 1.0)):
            yield kind, _with_values(torch.arange(1.0, 601).pow(-power), generator).bfloat16()
        return
    source = open_checkpoint(model)
    names = [name for name, info in source.infos.items() if len(info.shape) == 2 and ".layers." in name]
    numbers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names})
    for number in numbers[:: max(1, len(numbers) // layers)][:layers]:
        for name in names:
            if f".layers.{number}." in name:
                yield name, source.read(name)


def _with_values(sigma: Tensor, generator: torch.Generator) -> Tensor:
    left, right = (
        torch.linalg.qr(torch.randn(rows, len(sigma), generator=generator)).Q for rows in (700, 600)
    )
    return left * sigma @ right.T


def _trials(name: str, stored: Tensor, slices: list[str], seeds: range) -> Iterator[Trial]:
    """Every truncation of one matrix that the fast engine is asked for."""
    for matrix in (stored, stored.float() * (1.0 + 1e-4 * torch.rand(stored.shape))):
        squares = torch.linalg.svdvals(matrix.double()).square()
        arithmetic = "bfloat16" if multiplies_bfloat16(matrix) else "float32"
        for rank, slice_, tol, seed in product(RANKS, slices, TOLERANCES, seeds):
            if min(matrix.shape) <= space_needed(rank):
                continue
            solver = Solver(name, tol=tol, seed=seed)
            truncation = solver.top(matrix, rank) if slice_ == "top" else solver.bottom(matrix, rank)
            right = truncation.right_RI.double()
            kept = truncation.left_OR.double() * truncation.sigma_R.double() @ right
            if slice_ == "top":
                cost, best = (matrix.double() - kept).square().sum(), squares[rank:].sum()
            else:
                thin = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
                basis = right.T if thin.shape[1] == right.shape[1] else truncation.left_OR.double()
                cost, best = (thin @ basis).square().sum(), squares[-rank:].sum()
            spectrum = truncation.spectrum
            share = float((best / squares.sum()).sqrt())
            judged = spectrum.engine, spectrum.excess or 0.0, float((cost / best).sqrt()) - 1.0, share
            yield Trial(name, slice_, arithmetic, rank, tol, seed, *judged)


def _table(found: list[Trial]) -> Table:
    table = Table(title="estimated over true excess")
    heads = (
        "slice",
        "arithmetic",
        "truncations",
        "by LAPACK",
        "with a ratio",
        "least",
        "2 %",
        "median",
        "98 %",
    )
    for head in (*heads, "most", "above --tol", "at most"):
        table.add_column(head, justify="right")
    for key in sorted({(trial.slice, trial.arithmetic) for trial in found}, reverse=True):
        group = [trial for trial in found if (trial.slice, trial.arithmetic) == key]
        ratios = torch.tensor([trial.ratio for trial in group if trial.ratio], dtype=torch.float64)
        over = [
            trial.truth / trial.tol for trial in group if trial.engine == "fast" and trial.truth > trial.tol
        ]
        quantiles = ratios.quantile(torch.tensor([0.0, 0.02, 0.5, 0.98, 1.0], dtype=torch.float64)).tolist()
        lapack = sum(trial.engine != "fast" for trial in group)
        counts = (len(group), lapack, len(ratios))
        worst = f"{max(over):.2f} of it" if over else ""
        table.add_row(
            *key, *map(str, counts), *(f"{value:.2f}" for value in quantiles), str(len(over)), worst
        )
    return table


if __name__ == "__main__":
    main()
