"""DARE: the weighted sum of random entries (arXiv:2311.03099)."""

from collections.abc import Sequence

from torch import Tensor

from svdconvert.merging.base import BOTH, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, LAMBDA, MASK, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_random
from svdconvert.merging.sums import weighted_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """Weighted sum of random entries."""
    return weighted_sum(keep_random(changes, settings), settings)


METHOD = MergeMethod(
    summary="weighted sum of random entries",
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
