"""The weighted mean of the weights of all models (model soups, arXiv:2203.05482)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdconvert.errors import RecipeError
from svdconvert.merging.base import CHECKPOINTS, MergeMethod, Settings
from svdconvert.merging.parameters import WEIGHT, normalize


def merge(weights: Sequence[Tensor], settings: Settings) -> Tensor:
    """sum_t w_t W_t, divided by the sum of the weights if `normalize` is set.

    Raises RecipeError if that sum is zero.
    """
    shares = settings.numbers("weight")
    total = torch.zeros_like(weights[0])
    for tensor, share in zip(weights, shares, strict=True):
        total.add_(tensor, alpha=share)
    if not settings.shared["normalize"]:
        return total
    if abs(sum(shares)) < 1e-8:
        raise RecipeError("the weights of a mean sum to zero; set normalize to false, or other weights")
    return total.div_(sum(shares))


METHOD = MergeMethod(
    summary="weighted mean of the weights",
    paper="arXiv:2203.05482",
    takes=CHECKPOINTS,
    parameters=(WEIGHT, normalize(True)),
    weights=merge,
    by_entry=True,
    base="optional",
)
