"""The largest singular triplets of a matrix, with a measured error.

O: rows, I: columns, L: the longer and S: the shorter of both, R: rank, B: columns of a block.

A randomised start, some powers of W^T W, then a block Krylov space on the shorter side; Rayleigh and
Ritz choose R vectors in it, and one product of W with them gives the factors. The energy that every
block gains says how much is still missing, so the space grows by a tolerance and not by a count.
Where W holds bfloat16 numbers and the processor multiplies them faster, the space is built in
bfloat16; the last product is in float32, and so is the energy that the result is judged by.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from svdconvert.linalg.compute import multiplies_bfloat16
from svdconvert.linalg.exact import exact_top
from svdconvert.linalg.krylov import (
    Krylov,
    block_width,
    blocks_needed,
    first_width,
    missing,
    relative_excess,
    warm_start,
)
from svdconvert.linalg.orthonormal import orthonormal
from svdconvert.linalg.triplets import Spectrum, Triplets, spectrum_of, thin_svd, total_energy

__all__ = ["OVERSAMPLING", "Spectrum", "Triplets", "exact_top", "fast_top", "gram_top", "space_needed"]

OVERSAMPLING = 16
_POWERS = 3
_STEEP = 1e-5  # share of the energy outside below which subtracting energies says nothing in float32
_NOISE = 1e-13  # share of the energy whose loss is float32's own rounding: (3e-7)^2
_COARSE = 1e-3  # the least share outside that products in bfloat16 can be trusted with


def space_needed(rank: int) -> int:
    """The shorter side from which on the fast engine saves something: three halves of its first space."""
    return 3 * first_width(rank) // 2


def gram_top(weight_OI: Tensor, rank: int) -> Triplets:
    """The `rank` largest triplets of a matrix with a short side, from its whole Gram matrix in float64.

    As good as LAPACK's in float32 for what is no smaller than 1e-6 of the largest singular value.
    """
    if weight_OI.shape[0] < weight_OI.shape[1]:
        return gram_top(weight_OI.T, rank).turned()
    wide_LS = weight_OI.double()
    squares, vectors = torch.linalg.eigh(wide_LS.T @ wide_LS)
    basis_SR = vectors[:, -rank:].flip(1).to(weight_OI.dtype)
    return _project(weight_OI, basis_SR, float(squares.clamp_min(0.0).sum()), 0.0, "exact")


def fast_top(weight_OI: Tensor, rank: int, *, tol: float, generator: torch.Generator) -> Triplets | None:
    """The `rank` largest triplets of a float32 matrix, or None where `tol` was not reached.

    `tol` bounds the estimated excess of the residual's norm over the optimal one.
    """
    if weight_OI.shape[0] < weight_OI.shape[1]:
        found = fast_top(weight_OI.T, rank, tol=tol, generator=generator)
        return found.turned() if found else None
    total = total_energy(weight_OI)
    if total == 0.0:
        return _nothing(weight_OI, rank)
    start_SB = torch.randn(weight_OI.shape[1], block_width(rank), generator=generator).to(weight_OI.device)
    if multiplies_bfloat16(weight_OI):
        low_LS = weight_OI.to(torch.bfloat16)
        found = _Search(weight_OI, low_LS, rank, tol, total).run(start_SB)
        if found is not None:
            return found
    return _Search(weight_OI, weight_OI, rank, tol, total).run(start_SB)


@dataclass(frozen=True)
class _Search:
    """One attempt: a matrix, the form of it that is multiplied, and what is wanted."""

    weight_LS: Tensor
    low_LS: Tensor
    rank: int
    tol: float
    total: float

    @property
    def coarse(self) -> bool:
        """True where the space is built in a narrower dtype."""
        return self.low_LS.dtype != self.weight_LS.dtype

    def run(self, start_SB: Tensor) -> Triplets | None:
        """Grow the space until the estimate is below the tolerance; None where it does not get there."""
        short = self.weight_LS.shape[1]
        limit = min(3 * short // 4, max(1024, 12 * self.rank))
        core = torch.float32 if self.coarse else torch.float64
        krylov = Krylov(self._apply, warm_start(self._apply, start_SB, _POWERS), limit, core)
        blocks = first_width(self.rank) // krylov.block
        while krylov.width + blocks * krylov.block <= krylov.limit:
            for _ in range(blocks):
                krylov.grow()
            costs = self._costs(krylov)
            guess = self._excess(costs, missing(costs))
            if guess < self.tol:
                found = self._finish(krylov, costs)
                if found.spectrum.excess < self.tol:
                    return found
                if self.coarse:
                    return None
            blocks = blocks_needed(costs, guess, self.tol)
        return None

    def _apply(self, block_SB: Tensor) -> Tensor:
        """W^T W / ||W||^2: energies are shares of the whole, and no scale of W can overflow."""
        norm, low = self.total**0.5, self.low_LS.dtype
        image_LB = self.low_LS @ (block_SB / norm).to(low)
        return (self.low_LS.T @ image_LB).float() / norm

    def _costs(self, krylov: Krylov) -> list[float]:
        """Shares of the energy outside the best rank-R part of the last three spaces."""
        widths = [krylov.width - back * krylov.block for back in (2, 1, 0)]
        return [1.0 - float(krylov.values(width)[: self.rank].double().sum()) for width in widths]

    def _excess(self, costs: list[float], lost: float) -> float:
        if lost < _NOISE:
            return 0.0
        return relative_excess(max(costs[-1], _NOISE), lost)

    def _finish(self, krylov: Krylov, costs: list[float]) -> Triplets:
        basis_SR = orthonormal(krylov.vectors(self.rank))
        found = _project(self.weight_LS, basis_SR, self.total, 0.0, "fast")
        outside, lost = 1.0 - found.spectrum.energy, missing(costs)
        if outside < _STEEP:
            product = (found.left_OR * found.sigma_R) @ found.right_RI
            outside = total_energy(self.weight_LS - product) / self.total
        if self.coarse:
            lost = inf if outside < _COARSE else lost + max(outside - costs[-1], 0.0)
        excess = self._excess([outside], lost)
        spectrum = spectrum_of(found.sigma_R, self.total, excess, "fast")
        return Triplets(found.left_OR, found.sigma_R, found.right_RI, spectrum)


def _project(weight_LS: Tensor, basis_SR: Tensor, total: float, excess: float, engine: str) -> Triplets:
    """The SVD of W Q Q^T, from the float32 product W Q and the SVD of its thin result."""
    left_LR, sigma_R, mix_RR = thin_svd(weight_LS @ basis_SR)
    right_RS = (basis_SR @ mix_RR).T
    return Triplets(left_LR, sigma_R, right_RS, spectrum_of(sigma_R, total, excess, engine))


def _nothing(weight_OI: Tensor, rank: int) -> Triplets:
    rows, columns = weight_OI.shape
    left, right = (torch.eye(side, rank, device=weight_OI.device) for side in (rows, columns))
    sigma = torch.zeros(rank, device=weight_OI.device)
    return Triplets(left, sigma, right.T, spectrum_of(sigma, 0.0, 0.0, "fast"))
