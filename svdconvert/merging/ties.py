"""TIES: the largest entries, an election of signs, the mean of those that agree (arXiv:2306.01708)."""

from collections.abc import Iterator

from torch import Tensor

from svdconvert.merging.base import BOTH, Blocks, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, LAMBDA, MASK, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_largest
from svdconvert.merging.sums import agreeing_sum


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """Mean of the largest entries whose signs agree."""
    return (agreeing_sum(changes, settings) for changes in keep_largest(blocks, settings))


METHOD = MergeMethod(
    summary="mean of the largest entries whose signs agree",
    paper="arXiv:2306.01708",
    takes=BOTH,
    parameters=(
        WEIGHT,
        DENSITY,
        LAMBDA,
        normalize(True),
        rescale(False),
        MASK,
    ),
    blocks=merge,
)
