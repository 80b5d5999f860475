"""Singular triplets of changes, without those that are zero up to rounding."""

from collections.abc import Sequence

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]
"""(left_OR, sigma_R, right_RI), descending."""


def triplets(matrix_OI: Tensor, rank: int | None = None) -> Triplets:
    """At most `rank` triplets of a matrix whose singular values are above rounding."""
    left, sigma, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    count = numerical_rank(sigma, max(matrix_OI.shape))
    count = count if rank is None else min(count, rank)
    return left[:, :count], sigma[:count], right[:count]


def numerical_rank(sigma: Tensor, size: int) -> int:
    """How many singular values, in descending order, are above the rounding of the largest."""
    if not len(sigma):
        return 0
    return int((sigma > sigma[0] * size * torch.finfo(sigma.dtype).eps).sum())


def nearest_orthonormal(columns_OR: Tensor) -> Tensor:
    """P Q^T of the SVD P D Q^T: the nearest matrix with orthonormal columns (Procrustes).

    Directions in which the columns depend on each other, so that D is zero, are left out of the product.
    """
    left, _, right = triplets(columns_OR)
    return left @ right


def joined(parts: Sequence[Triplets]) -> Triplets:
    """The triplets of several matrices one after the other."""
    return (
        torch.cat([left for left, _, _ in parts], dim=1),
        torch.cat([sigma for _, sigma, _ in parts]),
        torch.cat([right for _, _, right in parts]),
    )
