"""DELLA: random entries, the larger the more probable, and an election of signs (arXiv:2406.11617)."""

from collections.abc import Iterator

from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, Blocks, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, EPSILON, LAMBDA, MASK, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_by_rank
from svdconvert.merging.sums import agreeing_sum


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """Mean of random, mostly large entries whose signs agree."""
    return (agreeing_sum(changes, settings) for changes in keep_by_rank(blocks, settings))


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
    blocks=merge,
    draws=True,
)
