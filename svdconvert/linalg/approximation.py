"""Low-rank approximations of a dense matrix by a rule for the rank.

O: out features, I: in features, R: rank.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from svdconvert.linalg.blocks import energy_outside
from svdconvert.linalg.solver import Solver

_TOL = 5e-4  # largest excess of the error over the optimum
_FIRST = 32  # rank that is tried first if the rank follows from the error


@dataclass(frozen=True, slots=True)
class Approximation:
    """left_OR @ right_RI, with singular values that are split evenly between both: B = U sqrt(S)."""

    left_OR: Tensor
    right_RI: Tensor
    sigma_R: Tensor
    """Descending, in float64."""
    rest: float
    """||matrix - left @ right||_F, measured."""

    def truncated(self, rank: int) -> "Approximation":
        """The part of the `rank` largest singular values; its error is measured, not estimated."""
        rest = sqrt(self.rest**2 + float(self.sigma_R[rank:].square().sum()))
        return Approximation(self.left_OR[:, :rank], self.right_RI[:rank], self.sigma_R[:rank], rest)


def of_rank(matrix_OI: Tensor, rank: int, name: str) -> Approximation:
    """The best approximation of this rank, or of the matrix's own if that is smaller.

    `name` seeds the random start. The error exceeds the optimum by at most 0.05 %.
    """
    found = Solver(name, tol=_TOL).top(matrix_OI, min(rank, *matrix_OI.shape))
    root_R = found.sigma_R.sqrt()
    left_OR = found.left_OR * root_R
    right_RI = root_R[:, None] * found.right_RI
    rest = sqrt(energy_outside(matrix_OI, left_OR, right_RI))
    return Approximation(left_OR, right_RI, found.sigma_R.double(), rest)


def within(matrix_OI: Tensor, norm: float, share: float, name: str) -> Approximation:
    """The approximation of the smallest rank whose error is at most `share` of the matrix's `norm`.

    The rank that is tried doubles until the error is small enough.
    """
    limit = share * norm
    rank = min(_FIRST, *matrix_OI.shape)
    found = of_rank(matrix_OI, rank, name)
    while found.rest > limit and rank < min(matrix_OI.shape):
        # Above half of the matrix's own rank, the full decomposition is as fast.
        rank = min(2 * rank, *matrix_OI.shape) if 4 * rank <= min(matrix_OI.shape) else min(matrix_OI.shape)
        found = of_rank(matrix_OI, rank, name)
    lost_R = torch.cat([found.sigma_R.square().flip(0).cumsum(0).flip(0), torch.zeros(1).double()])
    errors_R = (lost_R.cpu() + found.rest**2).sqrt()
    smallest = int((errors_R > limit).sum())
    return found.truncated(min(smallest, rank))
