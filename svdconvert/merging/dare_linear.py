"""DARE: the weighted sum of random entries (arXiv:2311.03099)."""

from collections.abc import Iterator

from torch import Tensor

from svdconvert.merging.base import BOTH, Blocks, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, LAMBDA, MASK, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_random
from svdconvert.merging.sums import weighted_sum


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """Weighted sum of random entries."""
    return (weighted_sum(changes, settings) for changes in keep_random(blocks, settings))


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
    blocks=merge,
    draws=True,
)
