"""Singular triplets of changes, without those that are zero up to rounding.

L: the longer and S: the shorter side of a matrix, R: rank, K: columns.

Changes of checkpoints are float32 and large: their right vectors come from the Gram matrix in float64, and
the others are products with a few rows of the change at a time, which can take its place in memory.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from svdconvert.linalg.blocks import gram, row_blocks, rows_at_once

Triplets = tuple[Tensor, Tensor, Tensor]
"""(left_OR, sigma_R, right_RI), descending."""


def triplets(matrix_OI: Tensor) -> Triplets:
    """All triplets of a small matrix whose singular values are above rounding."""
    left, sigma, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    count = _above(sigma, max(matrix_OI.shape) * torch.finfo(sigma.dtype).eps)
    return left[:, :count], sigma[:count], right[:count]


def right_vectors(matrix_LS: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma_R, right_SR) in float64, descending, of singular values that are above rounding; L >= S.

    A Gram matrix of float32 numbers in float64 shows singular values above about 1e-6 of the largest.
    """
    if matrix_LS.dtype == torch.float64:
        _, sigma, right = triplets(matrix_LS)
        return sigma, right.T
    squares, right_SS = torch.linalg.eigh(gram(matrix_LS, torch.float64))
    sigma = squares.flip(0).clamp_min(0.0).sqrt()
    count = _above(sigma, _resolved(len(sigma)))
    return sigma[:count], right_SS.flip(1)[:, :count]


def multiply_rows_(matrix_LS: Tensor, turn_SK: Tensor) -> Tensor:
    """matrix @ turn in the first K columns of the matrix itself: (L, K), with K <= S."""
    turn_SK = turn_SK.to(matrix_LS.dtype)
    for rows in row_blocks(matrix_LS):
        matrix_LS[rows, : turn_SK.shape[1]] = matrix_LS[rows] @ turn_SK
    return matrix_LS[:, : turn_SK.shape[1]]


def joined_rows(parts: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """(rows, these rows of matrices of the same length next to each other), a block at a time."""
    count = len(parts[0])
    step = rows_at_once(count, sum(part.shape[1] for part in parts))
    for rows in (slice(start, start + step) for start in range(0, count, step)):
        yield rows, torch.cat([part[rows] for part in parts], dim=1)


def orthonormalising(gram_KK: Tensor) -> Tensor:
    """C, (K, K), with X C the matrix of orthonormal columns that is nearest to X (Procrustes).

    It is (X^T X)^(-1/2), of the Gram matrix in float64. Directions in which the columns of X depend on each
    other are left out of X C.
    """
    squares, vectors_KK = torch.linalg.eigh(gram_KK)
    sizes = squares.flip(0).clamp_min(0.0).sqrt()
    count = _above(sizes, _resolved(len(sizes)))
    kept_KR = vectors_KK.flip(1)[:, :count]
    turn_KK: Tensor = (kept_KR / sizes[:count]) @ kept_KR.T
    return turn_KK


def _above(sigma: Tensor, share: float) -> int:
    """How many singular values, in descending order, are above this share of the largest."""
    return int((sigma > sigma[0] * share).sum()) if len(sigma) else 0


def _resolved(size: int) -> float:
    """The share of the largest singular value that is rounding in a Gram matrix of this size in float64."""
    return float(3 * (size * torch.finfo(torch.float64).eps) ** 0.5)
