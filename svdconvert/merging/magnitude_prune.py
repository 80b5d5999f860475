"""Magnitude pruning: the weighted sum of the largest entries of every change."""

from collections.abc import Iterator

from torch import Tensor

from svdconvert.merging.base import ADAPTERS, Blocks, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, LAMBDA, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_largest
from svdconvert.merging.sums import weighted_sum


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """Weighted sum of the largest entries."""
    return (weighted_sum(changes, settings) for changes in keep_largest(blocks, settings))


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
    blocks=merge,
)
