"""DARE with TIES: random entries, an election of signs, the sum of those that agree (arXiv:2311.03099)."""

from collections.abc import Iterator

from torch import Tensor

from svdconvert.merging.base import BOTH, Blocks, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, LAMBDA, MASK, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_random
from svdconvert.merging.sums import agreeing_sum


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """Sum of random entries whose signs agree."""
    return (agreeing_sum(changes, settings) for changes in keep_random(blocks, settings))


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
    blocks=merge,
    draws=True,
)
