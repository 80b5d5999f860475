"""SCE: the entries that vary most between the models, weighted by each model's energy (arXiv:2408.07990)."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, Blocks, MergeMethod, Parameter, Settings
from svdconvert.merging.magnitudes import Cut, Largest, find_cuts
from svdconvert.merging.parameters import MASK

_TINY = 1e-6


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """The mean of the changes, weighted by their mean squares, over those that agree with the sum's sign.

    If `select_topk` is below 1, only this share of the entries with the largest variance is changed.
    """
    stacks = _varying(blocks, settings.number("select_topk"))
    energies = sum((stacked.double().square().flatten(1).sum(1) for stacked in stacks()), torch.zeros(()))
    energies = energies / max(1, blocks.entries)
    total = float(energies.sum())
    for stacked in stacks():
        shares = energies / total if total >= _TINY else torch.full_like(energies, 1.0 / len(stacked))
        shares = shares.to(stacked.dtype).reshape(-1, *[1] * (stacked.dim() - 1))
        positive = stacked.sum(dim=0) >= 0
        agrees = torch.where(positive, stacked > 0, stacked < 0) * shares
        yield stacked.mul_(agrees).sum(dim=0).div_(agrees.sum(dim=0).clamp_(min=_TINY))


def _varying(blocks: Blocks, share: float) -> Callable[[], Iterator[Tensor]]:
    """Passes over the changes (models, rows, columns), with zeros for entries that do not vary enough."""

    def variances() -> Iterator[list[Tensor]]:
        return ([_variance(torch.stack(changes))] for changes in blocks)

    cut = Cut(-1.0)
    if share < 1.0:
        nonzero = sum(int(variance.count_nonzero()) for (variance,) in variances())
        (cut,) = find_cuts(replace(blocks, read=variances), [(0, int(nonzero * share))], blocks.entries)

    def kept() -> Iterator[Tensor]:
        mask = Largest(cut)
        for changes in blocks:
            stacked = torch.stack(changes)
            yield stacked.mul_(mask(_variance(stacked))) if share < 1.0 else stacked

    return kept


def _variance(stacked: Tensor) -> Tensor:
    return stacked.var(dim=0, unbiased=False)


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
    blocks=merge,
)
