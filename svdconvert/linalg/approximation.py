"""Low-rank approximations of a dense matrix by a rule for the rank.

O: out features, I: in features, R: rank.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from svdconvert.linalg.blocks import energy_outside
from svdconvert.linalg.krylov import space_needed
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.threads import fast_bfloat16
from svdconvert.linalg.triplets import Triplets, project

_TOL = 5e-4  # largest excess of the error over the optimum
# Shares of the energy outside the result: above the first it can be the difference of two energies (known to
# 3e-7), above the second rounding the matrix to bfloat16 (1e-6 of its energy) does not matter.
_CLEAR = 0.05
_COARSE = 0.01
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


def of_rank(matrix_OI: Tensor, norm: float, rank: int, name: str) -> Approximation:
    """The best approximation of this rank, or of the matrix's own if that is smaller.

    `norm` is the matrix's Frobenius norm, and `name` seeds the random start. The error exceeds the optimum by
    at most 0.05 %.
    """
    solver = Solver(name, tol=_TOL, measured=(matrix_OI, norm**2))
    rank = min(rank, *matrix_OI.shape)
    found = _from_bfloat16(matrix_OI, norm, rank, solver) or solver.top(matrix_OI, rank)
    root_R = found.sigma_R.sqrt()
    left_OR = found.left_OR * root_R
    right_RI = root_R[:, None] * found.right_RI
    outside = norm**2 * (1.0 - found.spectrum.energy)
    if not outside > _CLEAR * norm**2:
        outside = energy_outside(matrix_OI, left_OR, right_RI)
    return Approximation(left_OR, right_RI, found.sigma_R.double(), sqrt(outside))


def _from_bfloat16(matrix_OI: Tensor, norm: float, rank: int, solver: Solver) -> Triplets | None:
    """The projection on the singular vectors of the matrix in bfloat16, which are found in half of the time.

    Rounding moves the vectors by about its share of the norm, 1e-3, and the energy outside by the square of
    that. None if that is too much of what is outside, if the processor does not multiply bfloat16 faster, or
    if the matrix is so small that its full Gram matrix is decomposed.
    """
    device = matrix_OI.device.type
    if device != "cpu" or not fast_bfloat16(device) or min(matrix_OI.shape) <= space_needed(rank):
        return None
    near = solver.top(matrix_OI.bfloat16(), rank)
    if not near.spectrum.energy < 1.0 - _COARSE:
        return None
    excess = near.spectrum.excess or 0.0
    if matrix_OI.shape[0] < matrix_OI.shape[1]:
        return project(matrix_OI.T, near.left_OR, norm**2, excess, "fast").transposed()
    return project(matrix_OI, near.right_RI.T, norm**2, excess, "fast")


def within(matrix_OI: Tensor, norm: float, share: float, name: str) -> Approximation:
    """The approximation of the smallest rank whose error is at most `share` of the matrix's `norm`.

    The rank that is tried doubles until the error is small enough.
    """
    limit = share * norm
    rank = min(_FIRST, *matrix_OI.shape)
    found = of_rank(matrix_OI, norm, rank, name)
    while found.rest > limit and rank < min(matrix_OI.shape):
        # Above half of the matrix's own rank, the full decomposition is as fast.
        rank = min(2 * rank, *matrix_OI.shape) if 4 * rank <= min(matrix_OI.shape) else min(matrix_OI.shape)
        found = of_rank(matrix_OI, norm, rank, name)
    lost_R = torch.cat([found.sigma_R.square().flip(0).cumsum(0).flip(0), torch.zeros(1).double()])
    errors_R = (lost_R.cpu() + found.rest**2).sqrt()
    smallest = int((errors_R > limit).sum())
    return found.truncated(min(smallest, rank))
