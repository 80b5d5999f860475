"""The largest singular triplets of a matrix, with a measured error.

O: rows, I: columns, L: the longer and S: the shorter of both, R: rank, B: columns of a block.

A randomised start, some powers of W^T W, then a block Krylov space on the shorter side; Rayleigh and
Ritz choose R vectors in it, and one product of W with them gives the factors. The energy that every
block gains says how much is still missing, so the space grows by a tolerance and not by a count.
Where W holds bfloat16 numbers and the processor multiplies them faster, the space is built in
bfloat16; the last product is in float32, and so is the energy that the result is judged by.
"""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from svdconvert.linalg.compute import multiplies_bfloat16
from svdconvert.linalg.exact import exact_top
from svdconvert.linalg.krylov import Krylov, Outlook, Ritz, block_width, first_width, warm_start
from svdconvert.linalg.orthonormal import orthonormal
from svdconvert.linalg.triplets import Spectrum, Triplets, spectrum_of, thin_svd, total_energy

__all__ = ["OVERSAMPLING", "Spectrum", "Triplets", "exact_top", "fast_top", "gram_top", "space_needed"]

OVERSAMPLING = 16
_POWERS = 4
_STEEP = 1e-5  # share of the energy outside below which subtracting energies says nothing in float32
_NOISE = 1e-13  # share of the energy whose loss is float32's own rounding: (3e-7)^2
_FLOOR = 1e-6  # a residual below this share of the matrix is float32's own rounding
_COARSE_TOL = 1e-5  # an excess that products in bfloat16 do not reach
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
    if tol > _COARSE_TOL and multiplies_bfloat16(weight_OI):
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
        limit = min(3 * self.weight_LS.shape[1] // 4, max(1024, 12 * self.rank))
        core = torch.float32 if self.coarse else torch.float64
        krylov = Krylov(self.apply, warm_start(self.apply, start_SB, _POWERS), limit, core)
        blocks = first_width(self.rank) // krylov.block
        while krylov.width + blocks * krylov.block <= krylov.limit:
            krylov.grow(blocks)
            ritz = krylov.ritz(self.rank)
            outlook = self.outlook(ritz)
            if self.converged(outlook.excess(), outlook.missing):
                found = self.finish(krylov.vectors(ritz), outlook)
                if found.spectrum.excess < self.tol:
                    return found
                if self.coarse:
                    return None
            blocks = outlook.blocks_to(self.tol)
        return None

    def apply(self, block_SB: Tensor) -> Tensor:
        """W^T W / ||W||^2: energies are shares of the whole, and no scale of W can overflow."""
        norm, low = self.total**0.5, self.low_LS.dtype
        image_LB = self.low_LS @ (block_SB / norm).to(low)
        applied: Tensor = (self.low_LS.T @ image_LB).float() / norm
        return applied

    def outlook(self, ritz: Ritz) -> Outlook:
        """The cost is the share of the energy outside the best rank-R part of the space."""
        kept, before, coming = (float(part.sum()) for part in (ritz.values_R, ritz.before_R, ritz.coming_R))
        return Outlook.of(1.0 - before, 1.0 - kept, coming)

    def converged(self, excess: float, missing: float) -> bool:
        """True where the excess is below the tolerance, or what is missing is float32's own rounding."""
        return excess < self.tol or missing < _NOISE

    def finish(self, vectors_SR: Tensor, outlook: Outlook) -> Triplets:
        """The factors, and the excess with the energy outside as they leave it."""
        found = _project(self.weight_LS, orthonormal(vectors_SR), self.total, 0.0, "fast")
        outside = 1.0 - found.spectrum.energy
        if self.coarse:
            excess = outlook.excess(outside) if outside > _COARSE else inf
        else:
            if outside < _STEEP:
                product = (found.left_OR * found.sigma_R) @ found.right_RI
                outside = total_energy(self.weight_LS - product) / self.total
            floor = outside < _FLOOR**2 or outlook.missing < _NOISE
            excess = 0.0 if floor else replace(outlook, cost=outside).excess()
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
