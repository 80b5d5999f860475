"""The error that a LoRA would have at each rank, from the spectra of the changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import hypot, sqrt

from torch import Tensor

from svdconvert.linalg.low_rank import allocate_ranks
from svdconvert.linalg.spectrum import error_of_rank

_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class RankRow:
    """What a LoRA with one rank for all matrices would hold."""

    rank: int
    error: float
    """||change - BA||_F / ||change||_F over all target matrices."""
    nbytes: int
    budget_error: float
    """The same if the ranks were distributed over the matrices (--rank-budget), with the same sum."""


def rank_rows(spectra: Mapping[str, Tensor], size: Callable[[int], int]) -> list[RankRow]:
    """A row for each power of two below the largest rank that a change has.

    `spectra` are the squared singular values of the changes, descending, by matrix; `size` gives the bytes of
    a LoRA of a rank.
    """
    total = sqrt(sum(float(one.sum()) for one in spectra.values()))
    most = max((len(one) for one in spectra.values()), default=0)
    rows = []
    for rank in (rank for rank in _RANKS if rank < most and total):
        error = hypot(*(error_of_rank(one, rank) for one in spectra.values())) / total
        given = sum(min(rank, len(one)) for one in spectra.values())
        budget = allocate_ranks({name: one.sqrt() for name, one in spectra.items()}, given)
        best = hypot(*(error_of_rank(one, budget[name]) for name, one in spectra.items())) / total
        rows.append(RankRow(rank, error, size(rank), best))
    return rows
