"""Block Krylov spaces of a symmetric operator.  N: order, B: columns of a block, K: columns so far.

All earlier blocks are kept (Golub and Underwood 1977; Musco and Musco 2015, arXiv:1504.05477), and the
blocks are narrower than the rank that is looked for: at equal products a space of many narrow blocks
holds polynomials of a higher degree (Meyer, Musco and Musco 2023, arXiv:2305.02535).
"""

from collections.abc import Callable
from math import ceil, inf, log, sqrt

import torch
from torch import Tensor

from svdconvert.linalg.orthonormal import complement, ordered

_SCATTER = 1.15

Apply = Callable[[Tensor], Tensor]
"""(N, B) -> (N, B): a symmetric positive operator, in float32."""


def block_width(rank: int) -> int:
    """Columns of a block for a rank: half of it, in sixteens, as matrix units like them."""
    return min(16 * ceil(rank / 32), 64)


def first_width(rank: int) -> int:
    """Columns at which a space for a rank can first be judged: by the gains of its last two blocks."""
    block = block_width(rank)
    return block * (ceil(rank / block) + (3 if block == 16 else 2))


class Krylov:
    """A growing orthonormal basis and the operator's restriction to it."""

    def __init__(self, apply: Apply, start_NB: Tensor, limit: int, core: torch.dtype) -> None:
        """`limit` is the most columns, `core` the dtype of the small eigenvalue problems."""
        order, self.block = start_NB.shape
        self.limit = limit // self.block * self.block
        self._apply = apply
        self._basis_KN = start_NB.new_empty(self.limit, order)
        self._core_KK = start_NB.new_zeros(self.limit, self.limit, dtype=core)
        self._values: dict[int, Tensor] = {}
        self._next_NB: Tensor | None = start_NB
        self._rest_NB = start_NB
        self.width = 0

    @property
    def full(self) -> bool:
        """True where no block more has room."""
        return self.width + self.block > self.limit

    def grow(self) -> None:
        """One block more: one application, one projection."""
        if self._next_NB is None:
            self._next_NB = complement(self._rest_NB, self._basis_KN[: self.width])
        old, new = self.width, self.width + self.block
        self._basis_KN[old:new] = self._next_NB.T
        image_NB = self._apply(self._next_NB)
        basis_KN = self._basis_KN[:new]
        shares_KB = basis_KN @ image_NB
        self._core_KK[:new, old:new] = shares_KB
        self._rest_NB = torch.addmm(image_NB, basis_KN.T, shares_KB, alpha=-1)
        self._next_NB, self.width = None, new

    def values(self, width: int) -> Tensor:
        """Eigenvalues of the operator restricted to the first `width` columns, descending."""
        found = self._values.get(width)
        if found is None:
            found = self._values[width] = torch.linalg.eigvalsh(self._core(width), UPLO="U").flip(0)
        return found

    def vectors(self, rank: int) -> Tensor:
        """(N, rank): the Ritz vectors of the `rank` largest eigenvalues, the largest first."""
        values, mix = torch.linalg.eigh(self._core(self.width), UPLO="U")
        self._values[self.width] = values.flip(0)
        return self._basis_KN[: self.width].T @ mix[:, -rank:].flip(1).to(self._basis_KN)

    def _core(self, width: int) -> Tensor:
        return self._core_KK[:width, :width]


def warm_start(apply: Apply, start_NB: Tensor, powers: int) -> Tensor:
    """The start after some powers of the operator: as good as blocks, and they need not be kept."""
    block = ordered(start_NB)
    for _ in range(powers):
        block = ordered(apply(block))
    return block


def missing(costs: list[float]) -> float:
    """How far the last cost still lies above where a sequence of falling costs leads.

    The gains of a Krylov space shrink about geometrically, so what is to come is the last gain times
    q / (1 - q) with q the ratio of the last two. That was 0.6 to 2.6 times the truth on trained and on
    made-up matrices; a factor centres it. An estimate, not a bound.
    """
    if len(costs) < 3:
        return inf
    gain, before = costs[-2] - costs[-1], costs[-3] - costs[-2]
    if gain <= 0.0:
        return 0.0
    if before <= 0.0:
        return inf
    ratio = min(gain / before, 0.95)
    return _SCATTER * gain * ratio / (1.0 - ratio)


def relative_excess(cost: float, missing: float) -> float:
    """sqrt(cost / optimum) - 1 where the optimum is the cost less what is missing."""
    optimum = cost - missing
    return inf if optimum <= 0.0 else sqrt(cost / optimum) - 1.0


def blocks_needed(costs: list[float], excess: float, tol: float) -> int:
    """How many blocks more will bring the excess under `tol`, by the same extrapolation; 1 to 6."""
    gain, before = costs[-2] - costs[-1], costs[-3] - costs[-2]
    if not 0.0 < gain < before or not 0.0 < excess < inf:
        return 1
    return min(max(ceil(log(tol / excess) / log(gain / before)), 1), 6)
