"""Model Breadcrumbs with an election of signs (arXiv:2312.06795)."""

from collections.abc import Iterator

from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, Blocks, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, GAMMA, LAMBDA, MASK, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_middle
from svdconvert.merging.sums import agreeing_sum


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """Sum, without outliers and small entries, of those that agree."""
    return (agreeing_sum(changes, settings) for changes in keep_middle(blocks, settings))


METHOD = MergeMethod(
    summary="sum, without outliers and small entries, of those that agree",
    paper="arXiv:2312.06795",
    takes=CHECKPOINTS,
    parameters=(
        WEIGHT,
        DENSITY,
        GAMMA,
        LAMBDA,
        normalize(False),
        rescale(False),
        MASK,
    ),
    blocks=merge,
)
