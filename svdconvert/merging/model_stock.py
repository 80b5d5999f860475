"""Model Stock: between the mean of the models and their base, by their angles (arXiv:2403.19522)."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, MergeMethod, Parameter, Settings

_SMALL = 1e-6


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """t * mean(D), with t = N c / (1 + (N - 1) c) for N models and the mean cosine c of all pairs.

    With `filter_wise` c and t are those of each row.
    """
    count = len(changes)
    rows = settings.shared["filter_wise"]
    flat = [change.reshape(1, -1) if not rows or change.dim() == 1 else change for change in changes]
    norms = [torch.linalg.vector_norm(change, dim=-1, keepdim=True) for change in flat]
    cosines = [
        ((flat[one] * flat[other]).sum(dim=-1, keepdim=True) / (norms[one] * norms[other]).clamp(min=_SMALL))
        for one, other in combinations(range(count), 2)
    ]
    cosine = torch.stack([each.clamp(-1.0, 1.0) for each in cosines]).mean(dim=0)
    divisor = 1.0 + (count - 1) * cosine
    share = torch.where(divisor.abs() < _SMALL, 0.0, count * cosine / divisor)
    mean = flat[0]
    for other in flat[1:]:
        mean.add_(other)
    return mean.mul_(share / count).reshape(changes[0].shape)


METHOD = MergeMethod(
    summary="between the mean of the models and the base, by their angles",
    paper="arXiv:2403.19522",
    takes=CHECKPOINTS,
    parameters=(
        Parameter(name="filter_wise", default=False, summary="measure the angles in each row of a matrix"),
    ),
    changes=merge,
    least=2,
)
