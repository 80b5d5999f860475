"""The weighted mean of the weights of all models (model soups, arXiv:2203.05482)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from svdconvert.errors import RecipeError
from svdconvert.merging.base import CHECKPOINTS, Blocks, MergeMethod, Settings
from svdconvert.merging.parameters import WEIGHT, normalize


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """sum_t w_t W_t, divided by the sum of the weights if `normalize` is set.

    Raises RecipeError if that sum is zero.
    """
    shares = settings.numbers("weight")
    divisor = sum(shares) if settings.shared["normalize"] else 1.0
    if abs(divisor) < 1e-8:
        raise RecipeError("the weights of a mean sum to zero; set normalize to false, or other weights")
    for weights in blocks:
        total = torch.zeros_like(weights[0])
        for tensor, share in zip(weights, shares, strict=True):
            total.add_(tensor, alpha=share)
        yield total.div_(divisor)


METHOD = MergeMethod(
    summary="weighted mean of the weights",
    paper="arXiv:2203.05482",
    takes=CHECKPOINTS,
    parameters=(WEIGHT, normalize(True)),
    weights=merge,
    base="optional",
)
