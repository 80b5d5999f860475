"""Block Krylov spaces of a symmetric operator, and an estimate of what they still miss.

N: order, B: columns of a block, K: columns so far, R: rank.

All earlier blocks are kept (Golub and Underwood 1977; Musco and Musco 2015, arXiv:1504.05477), and the
blocks are narrower than the rank: for the same number of products, a space of many narrow blocks contains
polynomials of a higher degree (Meyer, Musco and Musco 2023, arXiv:2305.02535).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, inf, log, sqrt

import torch
from torch import Tensor

from svdconvert.linalg.gemm import matmul_f32
from svdconvert.linalg.orthonormal import complement, orthonormal_again, svqb
from svdconvert.linalg.triplets import Triplets

_CENTRE = 2.0  # makes the estimate about 1.5 times the truth, on trained and on synthetic matrices
_STUCK = 0.9  # of the excess two results before: if it fell by less, rounding is the cause, not the space
_NOISE = 1e-13  # share of the energy that float32 rounding loses: (3e-7)^2

Apply = Callable[[Tensor], Tensor]
"""(N, B) -> (N, B): a symmetric positive operator, in float32."""


def block_width(rank: int) -> int:
    """Columns of a block: half of the rank, as a multiple of 16 for the matrix units, at most 64."""
    return min(16 * ceil(rank / 32), 64)


def first_blocks(rank: int, block: int) -> int:
    """Blocks of this many columns in the space when it is first examined."""
    return ceil(rank / block) + (3 if block == 16 else 2)


def first_width(rank: int) -> int:
    """Columns of the space when it is first examined."""
    block = block_width(rank)
    return block * first_blocks(rank, block)


def space_needed(rank: int) -> int:
    """The shorter side above which the fast engine saves time: three halves of its first space."""
    return 3 * first_width(rank) // 2


def most_columns(order: int, rank: int) -> int:
    """Columns above which a space costs more than it saves."""
    return min(3 * order // 4, max(1024, 12 * rank))


def drawn(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Normal random numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def warm_start(apply: Apply, start_NB: Tensor, powers: int, basis: Apply = svqb) -> Tensor:
    """The start after `powers` applications: as good as that many blocks, but they need not be stored.

    `basis` orthonormalises a block.
    """
    block = basis(start_NB)
    for _ in range(powers):
        block = basis(apply(block))
    return block


@dataclass(frozen=True, slots=True)
class Ritz:
    """The best approximations that a space contains (Rayleigh-Ritz)."""

    values_R: Tensor
    """The largest eigenvalues in it, descending, in float64."""
    before_R: Tensor
    """The same one block earlier."""
    predicted_gain_R: Tensor
    """Approximately how much the next block will add to each."""
    mix_KR: Tensor
    """The eigenvectors, in the space's own basis."""
    step_R: Tensor
    """How far each eigenvector moves along its residual to gain that."""


class Krylov:
    """A growing orthonormal basis and the operator's restriction to it."""

    def __init__(
        self,
        apply: Apply,
        start_NB: Tensor,
        limit: int,
        core: torch.dtype = torch.float64,
        basis: Apply = svqb,
    ) -> None:
        """`limit` is the most columns, `core` the dtype of the small eigenvalue problems.

        `basis` orthonormalises a block.
        """
        order, self.block = start_NB.shape
        self.limit = limit // self.block * self.block
        self.width = 0
        self._seen = (0, start_NB.new_empty(0))
        self._apply = apply
        self._orthonormalise = basis
        self._basis_KN = start_NB.new_empty(self.limit, order)
        self._core_KK = start_NB.new_empty(self.limit, self.limit, dtype=core)
        self._rest_NB = start_NB

    def grow(self, blocks: int) -> None:
        """Add blocks; each takes one application and two projections."""
        for _ in range(blocks):
            old = self.width
            new = self.width + self.block
            block_NB = self._rest_NB
            if old:
                block_NB = complement(self._orthonormalise(block_NB), self._basis_KN[:old])
            self._basis_KN[old:new] = block_NB.T
            basis_KN = self._basis_KN[:new]
            image_NB = self._apply(block_NB)
            shares_KB = matmul_f32(basis_KN, image_NB)
            self._core_KK[:new, old:new] = shares_KB
            self._rest_NB = image_NB - matmul_f32(basis_KN.T, shares_KB)
            self.width = new

    def ritz(self, rank: int) -> Ritz:
        """The `rank` largest Ritz values and their vectors."""
        values, mix = torch.linalg.eigh(self._core(self.width), UPLO="U")
        width, before = self._seen
        if width != self.width - self.block:
            before = torch.linalg.eigvalsh(self._core(self.width - self.block), UPLO="U")
        self._seen = (self.width, values)
        values_R = values[-rank:].flip(0).double()
        mix_KR = mix[:, -rank:].flip(1)
        last = slice(self.width - self.block, self.width)
        gram_BB = matmul_f32(self._rest_NB.T, self._rest_NB).double()
        mix_BR = mix_KR[last].double()
        squares_R = (mix_BR * (gram_BB @ mix_BR)).sum(0).clamp_min(0.0)
        quotient = float(self._core_KK.diagonal()[last].min())
        step_R = residual_step(values_R, squares_R, quotient)
        before_R = before[-rank:].flip(0).double()
        return Ritz(values_R, before_R, squares_R * step_R, mix_KR, step_R)

    def vectors(self, ritz: Ritz) -> Tensor:
        """(N, R): the Ritz vectors after a step along their residuals, orthonormal to float32's rounding.

        The residual of a Ritz vector v is A v - value v, which the last application has already given: it is
        a combination of the next block. The step is nearly worth that block's application.
        """
        mix_KR = ritz.mix_KR.to(self._basis_KN)
        steps_BR = mix_KR[self.width - self.block :] * ritz.step_R.to(mix_KR)
        kept_NR = matmul_f32(self._basis_KN[: self.width].T, mix_KR)
        return orthonormal_again(kept_NR + matmul_f32(self._rest_NB, steps_BR))

    def _core(self, width: int) -> Tensor:
        return self._core_KK[:width, :width]


def residual_step(values_R: Tensor, squares_R: Tensor, quotient: float) -> Tensor:
    """How far Ritz vectors should move along their residuals, whose squared norms are `squares_R`.

    In the plane of a Ritz vector and its residual the operator is [[value, c], [c, q]] with the residual's
    norm c and its Rayleigh quotient q, for which `quotient` stands: the smallest of the last block's, because
    too large a q would take directions from outside the wanted ones. With the gap g = value - q, the larger
    eigenvalue is value + c^2 step with step = 2 / (g + sqrt(g^2 + 4 c^2)).
    """
    gap_R = (values_R - quotient).clamp_min(0.0)
    span_R = gap_R + (gap_R.square() + 4.0 * squares_R).sqrt()
    return 2.0 / span_R.clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True, slots=True)
class ErrorEstimate:
    """What a truncation costs, as a share of ||W||_F^2, and how far the cost may still fall."""

    cost: float
    missing: float
    """The cost minus the value that it would converge to. An estimate, not a bound."""
    ratio: float
    """Of the gains of two successive blocks."""
    rounding_floor: float = 0.0
    """What rounding has lost, which no further block recovers."""

    @staticmethod
    def of(
        before: float,
        cost: float,
        predicted_gain: float,
        *,
        centre: float = _CENTRE,
        least_ratio: float = 0.0,
        rounding_floor: float = 0.0,
    ) -> "ErrorEstimate":
        """From the costs one block earlier and now, and the predicted gain of the next block.

        The step along the residuals realises this gain. Those of further blocks shrink at first by the ratio
        to the last gain, and then more slowly: on trained and synthetic matrices their sum is 3 to 9 times
        the ratio times the predicted gain, with a median of 4.7. For a large ratio it is at least that of a
        geometric series. `centre` is 2, or more for a spectrum that ends more slowly. `least_ratio` stands
        for a smaller ratio, if the last gain does not show how fast the gains shrink.
        """
        gain = before - cost
        ratio = min(predicted_gain / gain, 0.95) if gain > 0.0 else 0.5
        ratio = max(ratio, least_ratio)
        missing = centre * predicted_gain * max(3.5 * ratio + 0.15, ratio / (1.0 - ratio))
        return ErrorEstimate(cost - predicted_gain, missing, ratio, rounding_floor)

    def excess(self) -> float:
        """sqrt(cost / optimum) - 1."""
        lost = self.missing + self.rounding_floor
        if lost < _NOISE:
            return 0.0
        return sqrt(self.cost / (self.cost - lost)) - 1.0 if lost < self.cost else inf

    def is_stuck(self, tol: float) -> bool:
        """True if rounding alone exceeds `tol`."""
        return replace(self, missing=0.0).excess() >= tol

    def blocks_to(self, tol: float) -> int:
        """How many more blocks will bring the excess below `tol`, by the same series; 1 to 6."""
        excess = self.excess()
        if not (0.0 < self.ratio < 1.0 and tol < excess < inf):
            return 1
        return min(max(ceil(log(tol / excess) / log(self.ratio)), 1), 6)


@dataclass(frozen=True)
class Search:
    """Grows a space until it contains a truncation that is good enough."""

    rank: int
    tol: float
    estimate: Callable[[Ritz], ErrorEstimate]
    finish: Callable[[Tensor, ErrorEstimate], tuple[Triplets, ErrorEstimate]]
    """(vectors_NR, estimate) -> the factors, and the estimate with the cost measured on them."""
    first: int
    """Blocks before the space is first examined."""

    def run(self, krylov: Krylov) -> Triplets | None:
        """The truncation, or None if the space was full before it was good enough."""
        blocks = min(self.first, krylov.limit // krylov.block)
        if blocks * krylov.block < self.rank:
            return None
        missed = [inf, inf]
        while krylov.width + blocks * krylov.block <= krylov.limit:
            krylov.grow(blocks)
            ritz = krylov.ritz(self.rank)
            estimate = self.estimate(ritz)
            if estimate.excess() < self.tol:
                found, estimate = self.finish(krylov.vectors(ritz), estimate)
                excess = estimate.excess()
                if excess < self.tol:
                    return replace(found, spectrum=replace(found.spectrum, excess=excess))
                if excess > _STUCK * missed[-2]:
                    return None
                missed.append(excess)
            if estimate.is_stuck(self.tol):
                return None
            blocks = estimate.blocks_to(self.tol)
        return None
