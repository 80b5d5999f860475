"""Many solves with one lower triangular matrix, as products of blocks.

S: its order, B: columns of a block that is solved for, P: rows of a panel.

LAPACK's triangular solve of a thin block and its Cholesky factorisation run at a quarter of the speed of a
product. Once the diagonal blocks are inverted, everything else is products (Golub and Van Loan, sections
3.1.4 and 4.2.9).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.linalg.gemm import matmul_f32

_PANEL = 256


@dataclass(frozen=True)
class Triangular:
    """A lower triangular matrix in panels of rows, with inverted diagonal blocks."""

    left: tuple[Tensor, ...]
    """Of each panel, the part to the left of its diagonal block: (P, rows above), contiguous."""
    inverse_PP: tuple[Tensor, ...]

    @staticmethod
    def of(factor_SS: Tensor) -> "Triangular":
        """From a lower triangular matrix; what is above its diagonal is ignored."""
        panels = _panels(factor_SS)
        return Triangular(
            tuple(factor_SS[rows, : rows.start].contiguous() for rows in panels),
            tuple(_inverse(factor_SS[rows, rows]) for rows in panels),
        )

    @staticmethod
    def cholesky(gram_SS: Tensor) -> "Triangular | None":
        """L of the matrix L L^T, which is overwritten; None if it is not positive definite."""
        left = []
        inverses = []
        for rows in _panels(gram_SS):
            below_XS = gram_SS[rows.start :, : rows.start]
            column_XP = gram_SS[rows.start :, rows]
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
        solution_SB = torch.empty_like(block_SB)
        start = 0
        for left, inverse_PP in zip(self.left, self.inverse_PP, strict=True):
            stop = start + len(inverse_PP)
            rest_PB = block_SB[start:stop]
            if start:
                rest_PB = rest_PB - matmul_f32(left, solution_SB[:start])
            solution_SB[start:stop] = matmul_f32(inverse_PP, rest_PB)
            start = stop
        return solution_SB

    def solve_transposed(self, block_SB: Tensor) -> Tensor:
        """X with L^T X = block."""
        solution_SB = block_SB.clone()
        stop = len(block_SB)
        for left, inverse_PP in zip(reversed(self.left), reversed(self.inverse_PP), strict=True):
            start = stop - len(inverse_PP)
            solution_SB[start:stop] = matmul_f32(inverse_PP.T, solution_SB[start:stop])
            if start:
                solution_SB[:start] -= matmul_f32(left.T, solution_SB[start:stop])
            stop = start
        return solution_SB


def _panels(matrix_SS: Tensor) -> list[slice]:
    order = len(matrix_SS)
    return [slice(start, min(start + _PANEL, order)) for start in range(0, order, _PANEL)]


def _inverse(corner_PP: Tensor) -> Tensor:
    inverse_PP: Tensor = torch.linalg.solve_triangular(
        corner_PP, torch.eye(len(corner_PP), dtype=corner_PP.dtype, device=corner_PP.device), upper=False
    )
    return inverse_PP
