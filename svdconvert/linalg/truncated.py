"""The largest singular triplets of a matrix, with a measured error.

O: rows, I: columns, L: the longer and S: the shorter of both, R: rank, B: columns of a block.

A random start, some powers of W^T W, then a block Krylov space on the shorter side. Rayleigh-Ritz gives R
vectors in it, and one product of W with them gives the factors. The energy that each block gains shows how
much is still missing, so the size of the space follows from a tolerance. If W holds bfloat16 numbers and the
processor multiplies them faster, the space is built in bfloat16; the last product and the energy by which
the result is judged are in float32.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdconvert.linalg.blocks import (
    energy_outside,
    gram,
    gram_times,
    held_by_float32,
    low_gram_times,
    total_energy,
)
from svdconvert.linalg.krylov import (
    ErrorEstimate,
    Krylov,
    Ritz,
    Search,
    block_width,
    most_columns,
    warm_start,
)
from svdconvert.linalg.threads import multiplies_bfloat16
from svdconvert.linalg.triplets import Triplets, project, spectrum_of

POWERS = 3
_LOOSE = 3e-3  # for a larger tolerance, one power less and one more block at first is faster
_CLEAR = 0.01  # of the largest square, or of all: float32 keeps five digits of it in a Gram matrix
_STEEP = 1e-5  # share of the energy outside below which a difference of energies is too inaccurate
_FLOOR = 1e-6  # a residual below this share of the matrix is only float32 rounding
_COARSE_TOL = 1e-5  # an excess that is out of reach with products in bfloat16
# Share of the energy that products in bfloat16 lose: about the mean square of one rounding, (2^-8)^2 / 6.
# Measured on trained and synthetic matrices: 1.2e-6 to 2.4e-6, for any rank.
_LOST = 2e-6
_SPREAD = 0.01  # of the largest square: the squares must span this for bfloat16 to separate them


def gram_top(weight_OI: Tensor, rank: int) -> Triplets:
    """The `rank` largest triplets of a matrix with a short side, from its full Gram matrix.

    As accurate as LAPACK in float32 for singular values above 1e-6 of the largest. The Gram matrix is in
    float32 only if neither the smallest value that is kept nor the sum of the others is small in it.
    """
    if weight_OI.shape[0] < weight_OI.shape[1]:
        return gram_top(weight_OI.T, rank).transposed()
    total = total_energy(weight_OI)
    clear = False
    if held_by_float32(total):
        squares, vectors = torch.linalg.eigh(gram(weight_OI, torch.float32))
        outside = float(squares[:-rank].double().sum())
        clear = float(squares[-rank]) > _CLEAR * float(squares[-1]) and outside > _CLEAR * total
    if not clear:
        squares, vectors = torch.linalg.eigh(gram(weight_OI, torch.float64))
        total = float(squares.clamp_min(0.0).sum())
    basis_SR = vectors[:, -rank:].flip(1).float()
    return project(weight_OI, basis_SR, total, 0.0, "exact")


def fast_top(weight_OI: Tensor, rank: int, *, tol: float, generator: torch.Generator) -> Triplets | None:
    """The `rank` largest triplets of a matrix of any float dtype, or None if `tol` was not reached.

    `tol` bounds the estimated excess of the residual's norm over the optimal one.
    """
    if weight_OI.shape[0] < weight_OI.shape[1]:
        found = fast_top(weight_OI.T, rank, tol=tol, generator=generator)
        return found.transposed() if found else None
    total = total_energy(weight_OI)
    if total == 0.0:
        return _nothing(weight_OI, rank)
    start_SB = torch.randn(weight_OI.shape[1], block_width(rank), generator=generator).to(weight_OI.device)
    if tol > _COARSE_TOL and multiplies_bfloat16(weight_OI):
        found = _Top(weight_OI, rank, total, weight_OI.bfloat16()).search(start_SB, tol)
        if found is not None:
            return found
    return _Top(weight_OI, rank, total).search(start_SB, tol)


@dataclass(frozen=True)
class _Top:
    """A search for the largest triplets of a matrix; `total` is its energy."""

    weight_LS: Tensor
    rank: int
    total: float
    low_LS: Tensor | None = None
    """The matrix in bfloat16, if the space is built in it."""

    @property
    def coarse(self) -> bool:
        """True if the space is built in bfloat16."""
        return self.low_LS is not None

    def search(self, start_SB: Tensor, tol: float) -> Triplets | None:
        """The truncation, or None if the estimate stayed above the tolerance."""
        limit = most_columns(self.weight_LS.shape[1], self.rank)
        core = torch.float32 if self.coarse else torch.float64
        powers, extra_blocks = (POWERS - 1, 1) if tol > _LOOSE else (POWERS, 0)
        krylov = Krylov(self.apply, warm_start(self.apply, start_SB, powers), limit, core)
        return Search(self.rank, tol, self.estimate, self.finish, extra_blocks).run(krylov)

    def apply(self, block_SB: Tensor) -> Tensor:
        """W^T W / ||W||^2: eigenvalues are shares of the energy, and no scale of W can overflow."""
        norm = self.total**0.5
        if self.low_LS is None:
            return gram_times(self.weight_LS, block_SB / norm).div_(norm)
        return low_gram_times(self.low_LS, block_SB / norm).div_(norm)

    def estimate(self, ritz: Ritz) -> ErrorEstimate:
        """The cost is the share of the energy outside the best rank-R part of the space."""
        kept, before, predicted_gain = (
            float(part.sum()) for part in (ritz.values_R, ritz.before_R, ritz.predicted_gain_R)
        )
        return ErrorEstimate.of(
            1.0 - before,
            1.0 - kept,
            predicted_gain,
            rounding_floor=self._rounding_floor(ritz) if self.coarse else 0.0,
        )

    def _rounding_floor(self, ritz: Ritz) -> float:
        """What bfloat16 loses; everything, if the values are too close to each other for it."""
        return _LOST if ritz.values_R[-1] < (1.0 - _SPREAD) * ritz.values_R[0] else 1.0

    def finish(self, vectors_SR: Tensor, estimate: ErrorEstimate) -> tuple[Triplets, ErrorEstimate]:
        """The factors, and the estimate with the energy outside them."""
        found = project(self.weight_LS, vectors_SR, self.total, 0.0, "fast")
        outside = 1.0 - found.spectrum.energy
        if self.coarse:
            return found, replace(estimate, cost=outside)
        if outside < _STEEP:
            left = found.left_OR * found.sigma_R
            outside = energy_outside(self.weight_LS, left, found.right_RI) / self.total
        if outside <= _FLOOR**2:
            return found, ErrorEstimate(outside, 0.0, 0.0)
        return found, replace(estimate, cost=outside)


def _nothing(weight_OI: Tensor, rank: int) -> Triplets:
    rows, columns = weight_OI.shape
    left, right = (torch.eye(side, rank, device=weight_OI.device) for side in (rows, columns))
    sigma = torch.zeros(rank, device=weight_OI.device)
    return Triplets(left, sigma, right.T, spectrum_of(sigma, 0.0, 0.0, "fast"))
