"""Magnitude pruning: the weighted sum of the largest entries of every change."""

from collections.abc import Sequence

from torch import Tensor

from svdconvert.merging.base import ADAPTERS, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, LAMBDA, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_largest
from svdconvert.merging.sums import weighted_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """Weighted sum of the largest entries."""
    return weighted_sum(keep_largest(changes, settings), settings)


METHOD = MergeMethod(
    summary="weighted sum of the largest entries",
    paper="PEFT's magnitude_prune",
    takes=ADAPTERS,
    parameters=(
        WEIGHT,
        DENSITY,
        LAMBDA,
        normalize(False),
        rescale(False),
    ),
    changes=merge,
)
