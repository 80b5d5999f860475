"""The smallest singular triplets of a matrix, without all the others.

L: the longer side, S: the shorter, R: rank, B: columns of a block.

The smallest of W are the largest of its inverse, so the engine of the top slice runs on
(W^T W)^-1 = R^-1 R^-T, as two triangular solves with the factor R of W = Q R, which costs far less than
an SVD. The cost of a truncation is here the energy inside it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdconvert.linalg.blocks import total_energy
from svdconvert.linalg.krylov import (
    ErrorEstimate,
    Krylov,
    Ritz,
    Search,
    block_width,
    drawn,
    first_blocks,
    most_columns,
    warm_start,
)
from svdconvert.linalg.threads import bfloat16_products, multiplies_bfloat16
from svdconvert.linalg.triangular import Triangular
from svdconvert.linalg.triplets import Triplets, project

_POWERS = 4
_PIVOT = 1e-7  # of the largest pivot: replaces a smaller one, which is nothing but rounding
_FLOOR = 1e-12  # share of the energy that is float32's own rounding
_CENTRE = 2.4  # the lower end of a spectrum is flat, so the gains shrink more slowly than at the upper end


def fast_bottom(
    weight_OI: Tensor, rank: int, *, tol: float, generator: torch.Generator, alone: bool = False
) -> Triplets | None:
    """The `rank` smallest triplets of a float32 matrix, or None if `tol` was not reached.

    `tol` bounds the estimated excess of their norm over the smallest possible one. The generator is on the
    matrix's device. `alone` is True if no other thread of the process multiplies matrices, so that
    process-wide settings may be changed.
    """
    if weight_OI.shape[0] < weight_OI.shape[1]:
        found = fast_bottom(weight_OI.T, rank, tol=tol, generator=generator, alone=alone)
        return found.transposed() if found else None
    total = total_energy(weight_OI)
    if total == 0.0:
        return None
    start_SB = drawn((weight_OI.shape[1], block_width(rank)), generator)
    if 2 * weight_OI.shape[0] >= 3 * weight_OI.shape[1] and multiplies_bfloat16(weight_OI):
        factor = Triangular.cholesky(_gram(weight_OI, alone).div_(total))
        found = _Bottom(weight_OI, factor, rank, total).search(start_SB, tol) if factor else None
        if found is not None:
            return found
    return _Bottom(weight_OI, _qr_factor(weight_OI, total), rank, total).search(start_SB, tol)


def _gram(weight_LS: Tensor, alone: bool) -> Tensor:
    """W^T W; only the blocks on and above the diagonal are multiplied.

    For a tall matrix of bfloat16 numbers, whose products are exact in float32, its Cholesky factor replaces
    QR, which would be most of the work. A square matrix is usually too ill-conditioned for that. The loss is
    measured: the energy inside, computed from W, then exceeds what the factor predicted.
    """
    short = weight_LS.shape[1]
    gram_SS = weight_LS.new_empty(short, short)
    step = -(-short // 8)
    with bfloat16_products(alone):
        for first in range(0, short, step):
            rows = slice(first, first + step)
            gram_SS[rows, first:] = weight_LS[:, rows].T @ weight_LS[:, first:]
            gram_SS[first + step :, rows] = gram_SS[rows, first + step :].T
    return gram_SS


def _qr_factor(weight_LS: Tensor, total: float) -> Triangular:
    """R^T / ||W|| of W = Q R, with pivots that are not too small to be divided by."""
    upper_SS = torch.linalg.qr(weight_LS, mode="r").R
    factor_SS = upper_SS.div_(total**0.5).T
    pivots = factor_SS.diagonal()
    least = _PIVOT * float(pivots.abs().max())
    pivots.copy_(torch.where(pivots.abs() < least, least, pivots))
    return Triangular.of(factor_SS)


@dataclass(frozen=True)
class _Bottom:
    """A search for the smallest triplets of a matrix.

    `factor` is the lower triangular factor of its Gram matrix divided by its energy `total`.
    """

    weight_LS: Tensor
    factor: Triangular
    rank: int
    total: float

    def search(self, start_SB: Tensor, tol: float) -> Triplets | None:
        """The truncation, or None if the estimate stayed above the tolerance."""
        limit = most_columns(self.weight_LS.shape[1], self.rank)
        krylov = Krylov(self.apply, warm_start(self.apply, start_SB, _POWERS), limit)
        first = first_blocks(self.rank, krylov.block)
        return Search(self.rank, tol, self.estimate, self.finish, first).run(krylov)

    def apply(self, block_SB: Tensor) -> Tensor:
        """||W||^2 (W^T W)^-1: its eigenvalues are inverse shares of the energy."""
        return self.factor.solve_transposed(self.factor.solve(block_SB))

    def estimate(self, ritz: Ritz) -> ErrorEstimate:
        """The cost is the share of the energy inside the R best directions of the space."""
        now = ritz.values_R.reciprocal()
        then = (ritz.values_R + ritz.predicted_gain_R).reciprocal()
        cost = float(now.sum())
        before = float(ritz.before_R.reciprocal().sum())
        return ErrorEstimate.of(before, cost, cost - float(then.sum()), centre=_CENTRE)

    def finish(self, vectors_SR: Tensor, estimate: ErrorEstimate) -> tuple[Triplets, ErrorEstimate]:
        """The factors, with their measured cost; its excess over the predicted cost counts as missing."""
        found = project(self.weight_LS, vectors_SR, self.total, 0.0, "fast")
        inside = found.spectrum.energy
        if inside <= _FLOOR:
            return found, ErrorEstimate(inside, 0.0, 0.0)
        more = max(inside - estimate.cost, 0.0)
        return found, replace(estimate, cost=inside, missing=estimate.missing + more)
