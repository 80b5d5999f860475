"""The weighted sum of the changes of adapters, exact: the factors one after the other (PEFT's cat)."""

from collections.abc import Sequence

import torch

from svdconvert.merging.base import ADAPTERS, MergeMethod, Product, Settings
from svdconvert.merging.parameters import WEIGHT


def merge(products: Sequence[Product], settings: Settings) -> Product:
    """B = [w_1 B_1, ..., w_T B_T] and A = [A_1; ...; A_T]."""
    weights = settings.numbers("weight")
    left = torch.cat([left * weight for (left, _), weight in zip(products, weights, strict=True)], dim=1)
    return left, torch.cat([right for _, right in products])


METHOD = MergeMethod(
    summary="weighted sum of the changes, exact",
    paper="arXiv:2212.04089",
    takes=ADAPTERS,
    parameters=(WEIGHT,),
    factors=merge,
)
