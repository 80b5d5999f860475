"""DARE with TIES: random entries, an election of signs, the sum of those that agree (arXiv:2311.03099)."""

from collections.abc import Sequence

from torch import Tensor

from svdconvert.merging.base import BOTH, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, LAMBDA, MASK, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_random
from svdconvert.merging.sums import agreeing_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """Sum of random entries whose signs agree."""
    return agreeing_sum(keep_random(changes, settings), settings)


METHOD = MergeMethod(
    summary="sum of random entries whose signs agree",
    paper="arXiv:2311.03099",
    takes=BOTH,
    parameters=(
        WEIGHT,
        DENSITY,
        LAMBDA,
        normalize(False),
        rescale(True),
        MASK,
    ),
    changes=merge,
    draws=True,
)
