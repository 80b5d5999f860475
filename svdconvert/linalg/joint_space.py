"""Several products of thin factors in the smallest common row and column space.

O: out features, I: in features, R: rank, K: rank of all products together, at most the sum of their ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def joint_space(products: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor], Tensor]:
    """(basis_OK, cores_KK, basis_KI) with left @ right = basis_OK @ core @ basis_KI for every product.

    The bases are the left singular vectors of [D_1, ..., D_T] and the right ones of [D_1; ...; D_T], with D_t
    the products: they depend, up to signs, on the products alone and not on how these are factored. Nothing
    is lost: directions in which all products are zero up to the rounding of the dtype are left out.
    """
    ranks = [left.shape[1] for left, _ in products]
    outer = torch.linalg.qr(torch.cat([left for left, _ in products], dim=1))
    inner = torch.linalg.qr(torch.cat([right for _, right in products]).T)
    pairs = zip(outer.R.split(ranks, dim=1), inner.R.split(ranks, dim=1), strict=True)
    cores = [left @ right.T for left, right in pairs]
    columns, sigma, _ = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    columns = columns[:, : _count(sigma)]
    _, sigma, rows = torch.linalg.svd(torch.cat(cores), full_matrices=False)
    rows = rows[: _count(sigma)]
    return outer.Q @ columns, [columns.T @ core @ rows.T for core in cores], rows @ inner.Q.T


def _count(sigma: Tensor) -> int:
    """How many singular values are above rounding."""
    if not len(sigma):
        return 0
    return int((sigma > sigma[0] * len(sigma) * torch.finfo(sigma.dtype).eps).sum())
