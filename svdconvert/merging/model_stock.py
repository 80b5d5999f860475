"""Model Stock: between the mean of the models and their base, by their angles (arXiv:2403.19522)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, Blocks, MergeMethod, Parameter, Settings

_SMALL = 1e-6


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """t * mean(D), with t = N c / (1 + (N - 1) c) for N models and the mean cosine c of all pairs.

    With `filter_wise` c and t are those of each row.
    """
    if settings.shared["filter_wise"]:
        for changes in blocks:
            yield _scaled_mean(changes, _share(_products(changes)))
    elif blocks.entries:
        products = [_products(changes).sum(dim=0, keepdim=True) for changes in blocks]
        share = _share(torch.cat(products).sum(dim=0, keepdim=True))
        for changes in blocks:
            yield _scaled_mean(changes, share)


def _products(changes: Sequence[Tensor]) -> Tensor:
    """The inner products of all pairs of changes, row by row: (rows, models, models) in float64."""
    stacked = torch.stack(list(changes), dim=1)
    return (stacked @ stacked.mT).double()


def _share(products: Tensor) -> Tensor:
    """t of each row, (rows, 1); NaN, which no merge accepts, if a norm overflows float32."""
    count = products.shape[-1]
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    pairs = torch.triu_indices(count, count, offset=1)
    sizes = (norms[:, pairs[0]] * norms[:, pairs[1]]).clamp(min=_SMALL)
    cosine = (products[:, pairs[0], pairs[1]] / sizes).clamp(-1.0, 1.0).mean(dim=-1, keepdim=True)
    divisor = 1.0 + (count - 1) * cosine
    share = torch.where(divisor.abs() < _SMALL, 0.0, count * cosine / divisor)
    return torch.where(norms.isfinite().all(dim=-1, keepdim=True), share, torch.nan)


def _scaled_mean(changes: Sequence[Tensor], share: Tensor) -> Tensor:
    """share * mean(changes); overwrites the first."""
    total = changes[0]
    for other in changes[1:]:
        total.add_(other)
    return total.mul_(share.to(total.dtype) / len(changes))


METHOD = MergeMethod(
    summary="between the mean of the models and the base, by their angles",
    paper="arXiv:2403.19522",
    takes=CHECKPOINTS,
    parameters=(
        Parameter(name="filter_wise", default=False, summary="measure the angles in each row of a matrix"),
    ),
    blocks=merge,
    least=2,
)
