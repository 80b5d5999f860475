"""How two products of thin factors are related.  O: out features, I: in features, R: rank."""

from dataclasses import dataclass
from math import acos, degrees

import torch
from torch import Tensor

Product = tuple[Tensor, Tensor]
"""(left_OR, right_RI)."""
_NULL = 1e-6  # of the largest singular value: directions below it are rounding


@dataclass(frozen=True, slots=True)
class Relation:
    """Norms of two products D = left @ right, and the angles between them."""

    norms: tuple[float, float]
    cosine: float | None
    """<D1, D2> / (||D1|| ||D2||); None if one is zero."""
    distance: float
    """||D2 - D1||_F."""
    ranks: tuple[int, int]
    """The numbers of singular values above rounding."""
    left_angles: tuple[float, ...]
    """Principal angles between the column spaces, in degrees, ascending."""
    right_angles: tuple[float, ...]
    """Principal angles between the row spaces."""


def relate(first: Product, second: Product) -> Relation:
    """Compare two products of the same shape, in float64, without building either."""
    one = _Svd(first)
    other = _Svd(second)
    inner = (one.left.T @ other.left) * (one.right.T @ other.right)
    along = float((one.sigma[:, None] * inner * other.sigma).sum())
    norms = one.norm, other.norm
    square = max(0.0, norms[0] ** 2 + norms[1] ** 2 - 2.0 * along)
    return Relation(
        norms=norms,
        cosine=max(-1.0, min(1.0, along / (norms[0] * norms[1]))) if all(norms) else None,
        distance=square**0.5,
        ranks=(len(one.sigma), len(other.sigma)),
        left_angles=_angles(one.left, other.left),
        right_angles=_angles(one.right, other.right),
    )


class _Svd:
    """The SVD of a product, without the directions that are only rounding."""

    def __init__(self, product: Product) -> None:
        left = torch.linalg.qr(product[0].double())
        right = torch.linalg.qr(product[1].double().T)
        outer, sigma, inner = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
        kept = sigma > _NULL * sigma[:1] if len(sigma) and float(sigma[0]) else sigma > 0
        self.sigma = sigma[kept]
        self.left = left.Q @ outer[:, kept]
        self.right = right.Q @ inner[kept].T
        self.norm = float(torch.linalg.vector_norm(self.sigma))


def _angles(one_OR: Tensor, other_OR: Tensor) -> tuple[float, ...]:
    """Principal angles of two orthonormal bases (Bjorck and Golub 1973), by cosines and sines.

    acos alone would lose half of the digits of a small angle.
    """
    if not one_OR.shape[1] or not other_OR.shape[1]:
        return ()
    small, large = sorted((one_OR, other_OR), key=lambda basis: basis.shape[1])
    cosines = torch.linalg.svdvals(large.T @ small).clamp(0.0, 1.0)
    sines = torch.linalg.svdvals(small - large @ (large.T @ small)).clamp(0.0, 1.0).flip(0)
    pairs = zip(cosines.tolist(), sines.tolist(), strict=True)
    return tuple(degrees(acos(cosine)) if cosine < 0.7 else _arc(sine) for cosine, sine in pairs)


def _arc(sine: float) -> float:
    return degrees(float(torch.asin(torch.tensor(sine, dtype=torch.float64))))
