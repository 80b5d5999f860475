"""The largest singular triplets of a matrix, with a measured error.

O: rows, I: columns, L: the longer and S: the shorter of both, R: rank, B: columns of a block.

A random start, some powers of W^T W, then a block Krylov space on the shorter side. Rayleigh-Ritz gives R
vectors in it, and one product of W with them gives the factors. The energy that each block gains shows how
much is still missing, so the size of the space follows from a tolerance. If W holds bfloat16 numbers and the
processor multiplies them faster, the space is built in bfloat16; the last product and the energy by which
the result is judged are in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from svdconvert.linalg.blocks import energy_outside, gram, held_by_float32, total_energy
from svdconvert.linalg.krylov import ErrorEstimate, Krylov, Ritz, Search, drawn, most_columns, warm_start
from svdconvert.linalg.operators import GramMatrix, LowSweeps, Operator, Sweeps
from svdconvert.linalg.threads import multiplies_bfloat16
from svdconvert.linalg.triplets import Triplets, project, spectrum_of

_CLEAR = 0.01  # of the largest square, or of all: float32 keeps five digits of it in a Gram matrix
_STEEP = 1e-5  # share of the energy outside below which a difference of energies is too inaccurate
_FLOOR = 1e-6  # a residual below this share of the matrix is only float32 rounding
_NEAR_BLOCKS = 2  # of a space that begins near to the result
_NEAR_RATIO = 0.5
_COARSE_TOL = 1e-5  # an excess that is out of reach with a coarse operator


def gram_top(weight_OI: Tensor, rank: int) -> Triplets:
    """The `rank` largest triplets of a matrix with a short side, from its full Gram matrix.

    As accurate as LAPACK in float32 for singular values above 1e-6 of the largest. The Gram matrix is in
    float32 only if neither the smallest value that is kept nor the sum of the others is small in it.
    """
    if weight_OI.shape[0] < weight_OI.shape[1]:
        return gram_top(weight_OI.T, rank).transposed()
    total = total_energy(weight_OI)
    clear = False
    # On a GPU, eigenvalue problems of this size are slower in float32 (12 ms instead of 4 for 432, H100).
    if held_by_float32(total) and weight_OI.device.type == "cpu":
        squares, vectors = torch.linalg.eigh(gram(weight_OI, torch.float32))
        outside = float(squares[:-rank].double().sum())
        clear = float(squares[-rank]) > _CLEAR * float(squares[-1]) and outside > _CLEAR * total
    if not clear:
        squares, vectors = torch.linalg.eigh(gram(weight_OI, torch.float64))
        total = float(squares.clamp_min(0.0).sum())
    basis_SR = vectors[:, -rank:].flip(1).float()
    return project(weight_OI, basis_SR, total, 0.0, "exact")


def fast_top(
    weight_OI: Tensor,
    rank: int,
    *,
    tol: float,
    generator: torch.Generator,
    near: tuple[Tensor, Tensor] | None = None,
    total: float | None = None,
) -> Triplets | None:
    """The `rank` largest triplets of a matrix of any float dtype, or None if `tol` was not reached.

    `tol` bounds the estimated excess of the residual's norm over the optimal one. The generator is on the
    matrix's device. `near` are factors (O, R) and (R, I) that are probably near to the result, which is then
    found faster. `total` is ||W||_F^2, if that is known.
    """
    if weight_OI.shape[0] < weight_OI.shape[1]:
        turned = (near[1].T, near[0].T) if near else None
        found = fast_top(weight_OI.T, rank, tol=tol, generator=generator, near=turned, total=total)
        return found.transposed() if found else None
    total = total_energy(weight_OI) if total is None else total
    if total == 0.0:
        return _nothing(weight_OI, rank)
    state = generator.get_state()
    for operator in _operators(weight_OI, total, tol):
        generator.set_state(state)
        top = _Top(weight_OI, rank, total, operator)
        found = top.search_near(near[1].T, tol, generator) if near else None
        if found := found or top.search(tol, generator):
            return found
    return None


def _operators(weight_LS: Tensor, total: float, tol: float) -> Iterator[Operator]:
    """What to search with, the fastest first; the next one if that does not reach the tolerance."""
    if tol > _COARSE_TOL:
        bfloat16 = multiplies_bfloat16(weight_LS)
        if weight_LS.device.type == "cuda":
            yield GramMatrix.of(weight_LS, total, bfloat16=bfloat16)
        elif bfloat16:
            yield LowSweeps(weight_LS.bfloat16(), total)
    yield Sweeps(weight_LS, total)


@dataclass(frozen=True)
class _Top:
    """A search for the largest triplets of a matrix; `total` is its energy."""

    weight_LS: Tensor
    rank: int
    total: float
    operator: Operator

    def search(self, tol: float, generator: torch.Generator) -> Triplets | None:
        """The truncation, or None if the estimate stayed above the tolerance."""
        order = self.weight_LS.shape[1]
        apply = self.operator.apply
        basis = self.operator.basis
        steps = self.operator.steps(self.rank, tol)
        start_SB = drawn((order, steps.block), generator)
        start_SB = warm_start(apply, start_SB, steps.powers, basis)
        krylov = Krylov(apply, start_SB, most_columns(order, self.rank), self.operator.core, basis)
        return Search(self.rank, tol, self.estimate, self.finish, steps.blocks).run(krylov)

    def search_near(self, near_SR: Tensor, tol: float, generator: torch.Generator) -> Triplets | None:
        """The truncation, from a space of two blocks as wide as the rank that begins with `near_SR`.

        None if that is not enough, or if there is no room for two.
        """
        limit = most_columns(self.weight_LS.shape[1], self.rank)
        if limit < _NEAR_BLOCKS * self.rank:
            return None
        norms_R = torch.linalg.vector_norm(near_SR, dim=0)
        start_SR = near_SR / norms_R
        if not bool((norms_R > 0).all()):
            start_SR = torch.where(norms_R > 0, start_SR, drawn((len(near_SR), self.rank), generator))
        basis = self.operator.basis
        krylov = Krylov(
            self.operator.apply, basis(start_SR), _NEAR_BLOCKS * self.rank, self.operator.core, basis
        )
        # The last gain is that over the start, which may be a bad one.
        estimate = partial(self.estimate, least_ratio=_NEAR_RATIO)
        return Search(self.rank, tol, estimate, self.finish, _NEAR_BLOCKS).run(krylov)

    def estimate(self, ritz: Ritz, least_ratio: float = 0.0) -> ErrorEstimate:
        """The cost is the share of the energy outside the best rank-R part of the space."""
        kept, before, predicted_gain = (
            float(part.sum()) for part in (ritz.values_R, ritz.before_R, ritz.predicted_gain_R)
        )
        floor = self.operator.rounding_floor(ritz)
        return ErrorEstimate.of(
            1.0 - before, 1.0 - kept, predicted_gain, least_ratio=least_ratio, rounding_floor=floor
        )

    def finish(self, vectors_SR: Tensor, estimate: ErrorEstimate) -> tuple[Triplets, ErrorEstimate]:
        """The factors, and the estimate with the energy outside them."""
        found = project(self.weight_LS, vectors_SR, self.total, 0.0, "fast")
        outside = 1.0 - found.spectrum.energy
        if self.operator.coarse:
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
