"""SVDs of products of thin factors, without building the product.  O: out features, I: in features, R: rank.

QR of both factors and the SVD of the R x R matrix between them give the SVD of left @ right. For 2048 x 1024
and rank 16 that takes a millisecond; a dense SVD takes nearly a second.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def singular_values(left_OR: Tensor, right_RI: Tensor) -> Tensor:
    """The singular values of left @ right, descending, without those that must be zero."""
    # mode "r" makes no Q, which takes half of the time and memory
    core = torch.linalg.qr(left_OR, mode="r").R @ torch.linalg.qr(right_RI.T, mode="r").R.T
    values: Tensor = torch.linalg.svdvals(core)
    return values


def product_norm(left_OR: Tensor, right_RI: Tensor) -> float:
    """Frobenius norm of left @ right."""
    return float(torch.linalg.vector_norm(singular_values(left_OR.double(), right_RI.double())))


def product_distance(left_OR: Tensor, right_RI: Tensor, other_OR: Tensor, other_RI: Tensor) -> float:
    """Frobenius norm of left @ right - other @ other, for two products of the same shape."""
    both_OR = torch.cat([left_OR.double(), -other_OR.double()], dim=1)
    return product_norm(both_OR, torch.cat([right_RI.double(), other_RI.double()]))


@dataclass(frozen=True)
class Truncated:
    """The best approximation of a product of thin factors."""

    left_OR: Tensor
    right_RI: Tensor
    kept: float
    """Frobenius norm of the approximation."""
    lost: float
    """Frobenius norm of what is left out."""


def truncate(left_OR: Tensor, right_RI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) in float32, with B @ A the best approximation of left @ right of rank `rank`.

    The singular values are split evenly: B = U sqrt(S), A = sqrt(S) V^T.
    """
    found = truncated([left_OR, right_RI], rank)
    return found.left_OR, found.right_RI


def truncated(product: list[Tensor], rank: int) -> Truncated:
    """As `truncate`, with the norms, of the factors in `product`, which is emptied to free their memory."""
    right = torch.linalg.qr(product.pop().double().T)
    left = torch.linalg.qr(product.pop().double())
    outer, sigma, inner = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    kept_OR = left.Q @ (outer[:, :rank] * root)
    kept_RI = (root[:, None] * inner[:rank]) @ right.Q.T
    kept = float(torch.linalg.vector_norm(sigma[:rank]))
    return Truncated(kept_OR.float(), kept_RI.float(), kept, truncation_error(sigma, rank))


def rank_for_tolerance(sigma: Tensor, tol: float) -> int:
    """The smallest rank whose truncation loses at most the share `tol` of the Frobenius norm."""
    tails = sigma.double().square().flip(0).cumsum(0).flip(0)
    return int((tails > tol**2 * tails[:1]).sum())


def allocate_ranks(sigmas: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks that sum to at most `budget` and lose the least energy over all products together.

    The `budget` largest of all singular values are kept, and the earlier ones of equal values.
    """
    values = torch.cat([sigma.double() for sigma in sigmas.values()])
    owners = torch.cat([torch.full((len(sigma),), at) for at, sigma in enumerate(sigmas.values())])
    largest = values.argsort(descending=True, stable=True)[:budget]
    counts = owners[largest][values[largest] > 0].bincount(minlength=len(sigmas))
    return dict(zip(sigmas, counts.tolist(), strict=True))


def truncation_error(sigma: Tensor, rank: int) -> float:
    """Frobenius norm of what a truncation to `rank` loses."""
    return float(torch.linalg.vector_norm(sigma.double()[rank:]))
