"""Low-rank task vectors: the sum of the best approximations of every change (arXiv:2412.00081, TSV-C)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdconvert.linalg.solver import Solver
from svdconvert.merging.base import CHECKPOINTS, MergeMethod, Parameter, Settings
from svdconvert.merging.parameters import LAMBDA, WEIGHT, normalize
from svdconvert.merging.sums import weighted_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """lambda * sum_t w_t U_t S_t V_t^T with the `rank` largest triplets of each change.

    A tensor that is no matrix keeps its whole change. Overwrites the changes.
    """
    if changes[0].dim() != 2:
        return weighted_sum(changes, settings)
    rank = min(int(settings.number("rank")), *changes[0].shape)
    for model, change in enumerate(changes):
        top = Solver(f"{model}:{settings.name}", seed=settings.seed).top(change, rank)
        torch.matmul(top.left_OR * top.sigma_R, top.right_RI, out=change)
    return weighted_sum(changes, settings)


METHOD = MergeMethod(
    summary="weighted sum of the changes, each cut to a rank",
    paper="arXiv:2412.00081",
    takes=CHECKPOINTS,
    parameters=(
        WEIGHT,
        Parameter(name="rank", default=64.0, least=1.0, most=1e6, summary="singular triplets of each change"),
        LAMBDA,
        normalize(False),
    ),
    changes=merge,
    draws=True,
)
