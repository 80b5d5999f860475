"""DELLA: random entries, the larger the more probable, and an election of signs (arXiv:2406.11617)."""

from collections.abc import Sequence

from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, EPSILON, LAMBDA, MASK, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_by_rank
from svdconvert.merging.sums import agreeing_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """Mean of random, mostly large entries whose signs agree."""
    return agreeing_sum(keep_by_rank(changes, settings), settings)


METHOD = MergeMethod(
    summary="mean of random, mostly large entries whose signs agree",
    paper="arXiv:2406.11617",
    takes=CHECKPOINTS,
    parameters=(
        WEIGHT,
        DENSITY,
        EPSILON,
        LAMBDA,
        normalize(True),
        rescale(True),
        MASK,
    ),
    changes=merge,
    draws=True,
)
