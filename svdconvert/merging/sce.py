"""SCE: the entries that vary most between the models, weighted by each model's energy (arXiv:2408.07990)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, MergeMethod, Parameter, Settings
from svdconvert.merging.parameters import MASK
from svdconvert.merging.sparsity import first_largest

_TINY = 1e-6


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """The mean of the changes, weighted by their mean squares, over those that agree with the sum's sign.

    If `select_topk` is below 1, only this share of the entries with the largest variance is changed.
    """
    stacked = torch.stack(list(changes))
    share = settings.number("select_topk")
    if share < 1.0:
        variance = stacked.var(dim=0, unbiased=False)
        stacked.mul_(first_largest(variance, int(int(variance.count_nonzero()) * share)))
    positive = stacked.sum(dim=0) >= 0
    energies = stacked.square().reshape(len(stacked), -1).mean(dim=1)
    total = float(energies.sum())
    shares = torch.full_like(energies, 1.0 / len(energies)) if total < _TINY else energies / total
    shares = shares.reshape(-1, *[1] * changes[0].dim())
    agrees = torch.where(positive, stacked > 0, stacked < 0) * shares
    return (stacked * agrees).sum(dim=0).div_(agrees.sum(dim=0).clamp_(min=_TINY))


METHOD = MergeMethod(
    summary="mean, weighted by energy, of the entries that vary most",
    paper="arXiv:2408.07990",
    takes=CHECKPOINTS,
    parameters=(
        Parameter(
            name="select_topk",
            default=1.0,
            least=0.0,
            most=1.0,
            summary="share of entries that is changed",
        ),
        MASK,
    ),
    changes=merge,
)
