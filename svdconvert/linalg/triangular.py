"""A lower triangular matrix that is solved with many times, in products of blocks.

S: its order, B: columns of a block that is solved for, P: rows of a panel.

LAPACK's triangular solve of a thin block and its Cholesky factorisation run at a quarter of the speed of a
product. Where the diagonal blocks are inverted once, all the rest is products (Golub and Van Loan, sections
3.1.4 and 4.2.9).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.linalg.gemm import matmul_f32

_PANEL = 256


@dataclass(frozen=True)
class Triangular:
    """Panels of rows, each what lies left of its diagonal block, and the diagonal blocks' inverses."""

    left: tuple[Tensor, ...]
    """(P, rows above) each, without gaps."""
    inverse_PP: tuple[Tensor, ...]

    @staticmethod
    def of(factor_SS: Tensor) -> "Triangular":
        """Of a lower triangular matrix; what is above its diagonal is not looked at."""
        panels = _panels(factor_SS)
        return Triangular(
            tuple(factor_SS[rows, : rows.start].contiguous() for rows in panels),
            tuple(_inverse(factor_SS[rows, rows]) for rows in panels),
        )

    @staticmethod
    def cholesky(gram_SS: Tensor) -> "Triangular | None":
        """L of a positive matrix L L^T, whose memory it takes; None of a matrix that is not positive."""
        left, inverses = [], []
        for rows in _panels(gram_SS):
            below_XS, column_XP = gram_SS[rows.start :, : rows.start], gram_SS[rows.start :, rows]
            left.append(gram_SS[rows, : rows.start].contiguous())
            if rows.start:
                column_XP -= matmul_f32(below_XS, left[-1].T)
            size = column_XP.shape[1]
            corner_PP, failed = torch.linalg.cholesky_ex(column_XP[:size])
            if int(failed):
                return None
            inverses.append(_inverse(corner_PP))
            column_XP[size:] = matmul_f32(column_XP[size:], inverses[-1].T)
        return Triangular(tuple(left), tuple(inverses))

    def solve(self, block_SB: Tensor) -> Tensor:
        """X with L X = block."""
        found_SB, start = torch.empty_like(block_SB), 0
        for left, inverse_PP in zip(self.left, self.inverse_PP, strict=True):
            stop = start + len(inverse_PP)
            rest_PB = block_SB[start:stop]
            if start:
                rest_PB = rest_PB - matmul_f32(left, found_SB[:start])
            found_SB[start:stop] = matmul_f32(inverse_PP, rest_PB)
            start = stop
        return found_SB

    def solve_transposed(self, block_SB: Tensor) -> Tensor:
        """X with L^T X = block."""
        found_SB, stop = block_SB.clone(), len(block_SB)
        for left, inverse_PP in zip(reversed(self.left), reversed(self.inverse_PP), strict=True):
            start = stop - len(inverse_PP)
            found_SB[start:stop] = matmul_f32(inverse_PP.T, found_SB[start:stop])
            if start:
                found_SB[:start] -= matmul_f32(left.T, found_SB[start:stop])
            stop = start
        return found_SB


def _panels(matrix_SS: Tensor) -> list[slice]:
    order = len(matrix_SS)
    return [slice(start, min(start + _PANEL, order)) for start in range(0, order, _PANEL)]


def _inverse(corner_PP: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(
        corner_PP, torch.eye(len(corner_PP), dtype=corner_PP.dtype, device=corner_PP.device), upper=False
    )
    return found
