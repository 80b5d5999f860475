"""Weighted sums of changes, with and without an election of signs (TIES, arXiv:2306.01708)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdconvert.merging.base import Product, Settings

_TINY = 1e-8  # a sum of weights that counts as zero


def weighted_sum(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """lambda * sum_t w_t D_t, divided by the sum of the weights if `normalize` is set.

    Overwrites the first change.
    """
    weights = settings.numbers("weight")
    total = changes[0].mul_(weights[0])
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total.add_(change, alpha=weight)
    divisor = sum(weights) if settings.shared.get("normalize") else 1.0
    return _scaled(total, settings, 1.0 if abs(divisor) < _TINY else divisor)


def agreeing_sum(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """lambda * the sum of those w_t D_t whose sign is that of sum_t w_t D_t, entry by entry.

    With `normalize` each entry is divided by the weights of the models that are in its sum. Overwrites the
    changes.
    """
    weights = settings.numbers("weight")
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total.add_(change, alpha=weight)
    positive = total >= 0
    total.zero_()
    divisor = torch.zeros_like(total)
    for change, weight in zip(changes, weights, strict=True):
        weighted = change.mul_(weight)
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        total.add_(weighted.mul_(agrees))
        divisor.add_(agrees, alpha=weight)
    if settings.shared.get("normalize"):
        total.div_(divisor.masked_fill_(divisor == 0, 1.0))
    return _scaled(total, settings, 1.0)


def concatenated(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """B = [w_1 B_1, ..., w_T B_T] and A = [A_1; ...; A_T] in float64: the weighted sum of the products."""
    left = torch.cat([left for left, _ in products], dim=1).double()
    ranks = torch.tensor([right.shape[0] for _, right in products], device=left.device)
    factors = torch.tensor(weights, dtype=left.dtype, device=left.device)
    right = torch.cat([right for _, right in products]).double()
    return left.mul_(factors.repeat_interleave(ranks)), right


def _scaled(total: Tensor, settings: Settings, divisor: float) -> Tensor:
    factor = float(settings.shared.get("lambda", 1.0)) / divisor
    return total if factor == 1.0 else total.mul_(factor)
