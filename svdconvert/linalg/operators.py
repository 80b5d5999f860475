"""The operator W^T W / ||W||_F^2 that a search for the largest triplets applies, in three ways.

L: rows, S: columns, with L >= S; B: columns of a block.

Its eigenvalues are shares of the energy, and no scale of W can overflow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from svdconvert.linalg.blocks import gram, gram_times, low_gram, low_gram_times
from svdconvert.linalg.krylov import Ritz, block_width, first_blocks
from svdconvert.linalg.orthonormal import orthonormal, svqb

POWERS = 3
_SMALL = 1 << 21  # elements
_SHORT = 2048  # rows of a block
_LOOSE = 3e-3  # for a larger tolerance, less work before the first look at the space is faster
# Share of the energy that products in bfloat16 lose: about the mean square of one rounding, (2^-8)^2 / 6.
# Measured on trained and synthetic matrices: 1.2e-6 to 2.4e-6, for any rank.
_LOST = 2e-6
_SPREAD = 0.01  # of the largest square: the squares must span this for bfloat16 to separate them
_CLEAR = 1e-3  # of the largest square, and of all: a Gram matrix in float32 holds three digits of it


@dataclass(frozen=True, slots=True)
class Steps:
    """How the space of a search is built."""

    block: int
    """Columns of a block."""
    powers: int
    """Applications before the first block is kept."""
    blocks: int
    """Blocks before the space is first examined."""


class Operator(Protocol):
    """(S, B) -> (S, B), and what a search should know of it."""

    @property
    def core(self) -> torch.dtype:
        """Of the small eigenvalue problems."""

    @property
    def coarse(self) -> bool:
        """True if only the measured energy says how good a result is."""

    @property
    def basis(self) -> Callable[[Tensor], Tensor]:
        """Orthonormalises a block."""

    def steps(self, rank: int, tol: float) -> Steps:
        """How the space for a rank and a tolerance is built."""

    def apply(self, block_SB: Tensor) -> Tensor:
        """One application."""

    def rounding_floor(self, ritz: Ritz) -> float:
        """The share of the energy that rounding loses; 1 if the operator cannot separate the values."""


def narrow_steps(rank: int, tol: float, elements: int) -> Steps:
    """If applications cost much more than anything else: narrow blocks, most of which are kept.

    `elements` is the size of the matrix: if it is small, a second look at the space costs more than a block.
    """
    block = block_width(rank)
    powers = 1 if tol > _LOOSE else POWERS
    return Steps(block, powers, first_blocks(rank, block) + (elements < _SMALL))


def wide_steps(rank: int, tol: float) -> Steps:
    """If applications are cheap: blocks of 3/4 of the rank, more powers, and a small eigenvalue problem."""
    block = 16 * ceil(3 * rank / 64)
    return Steps(block, 4 if tol > _LOOSE else 6, ceil(rank / block) + 1)


@dataclass(frozen=True)
class Sweeps:
    """Both products with W in float32; `total` is its energy."""

    weight_LS: Tensor
    total: float
    core: torch.dtype = torch.float64
    coarse: bool = False

    @property
    def basis(self) -> Callable[[Tensor], Tensor]:
        """Cholesky QR for short blocks: SVQB takes three times as long for them, and half for long ones."""
        return orthonormal if self.weight_LS.shape[1] <= _SHORT else svqb

    def steps(self, rank: int, tol: float) -> Steps:
        """Narrow blocks."""
        return narrow_steps(rank, tol, self.weight_LS.numel())

    def apply(self, block_SB: Tensor) -> Tensor:
        """One pass over W."""
        norm = self.total**0.5
        return self._products(block_SB / norm).div_(norm)

    def rounding_floor(self, ritz: Ritz) -> float:
        """None that matters."""
        return 0.0

    def _products(self, block_SB: Tensor) -> Tensor:
        return gram_times(self.weight_LS, block_SB)


@dataclass(frozen=True)
class LowSweeps(Sweeps):
    """The same in bfloat16, if W holds bfloat16 numbers and the processor multiplies these faster.

    W is given in bfloat16, and each block is rounded to it as well.
    """

    core: torch.dtype = torch.float32
    coarse: bool = True

    @property
    def basis(self) -> Callable[[Tensor], Tensor]:
        """With Cholesky QR, what bfloat16 loses of a column would be in proportion to the largest one."""
        return svqb

    def rounding_floor(self, ritz: Ritz) -> float:
        """What bfloat16 loses; everything, if the values are too close to each other for it."""
        return _LOST if ritz.values_R[-1] < (1.0 - _SPREAD) * ritz.values_R[0] else 1.0

    def _products(self, block_SB: Tensor) -> Tensor:
        return low_gram_times(self.weight_LS, block_SB)


@dataclass(frozen=True)
class GramMatrix:
    """Products with the matrix W^T W / ||W||^2, which is multiplied out once.

    For a GPU. Its matrix units multiply W^T W of 11008 x 4096 bfloat16 numbers, exactly and with sums in
    float32, in 0.5 ms; an application in float32 then takes 0.2 ms, and what counts is the number of steps
    (H100). Cholesky QR is enough, because an application rounds no more than float32 does.
    """

    share_SS: Tensor
    core: torch.dtype = torch.float64
    coarse: bool = True
    basis: Callable[[Tensor], Tensor] = orthonormal

    @staticmethod
    def of(weight_LS: Tensor, total: float, *, bfloat16: bool) -> "GramMatrix":
        """`bfloat16` is True if W holds only bfloat16 numbers."""
        product_SS = low_gram(weight_LS.bfloat16()) if bfloat16 else gram(weight_LS, torch.float32)
        return GramMatrix(product_SS.div_(total))

    def steps(self, rank: int, tol: float) -> Steps:
        """Wide blocks."""
        return wide_steps(rank, tol)

    def apply(self, block_SB: Tensor) -> Tensor:
        """One product."""
        return self.share_SS @ block_SB

    def rounding_floor(self, ritz: Ritz) -> float:
        """Everything, if the smallest value or the energy outside is too small for a float32 Gram matrix."""
        outside = 1.0 - float(ritz.values_R.sum())
        clear = float(ritz.values_R[-1]) > _CLEAR * float(ritz.values_R[0]) and outside > _CLEAR
        return 0.0 if clear else 1.0
