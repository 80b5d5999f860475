"""Model Breadcrumbs: without the largest and the smallest entries (arXiv:2312.06795)."""

from collections.abc import Iterator

from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, Blocks, MergeMethod, Settings
from svdconvert.merging.parameters import DENSITY, GAMMA, LAMBDA, MASK, WEIGHT, normalize, rescale
from svdconvert.merging.sparsity import keep_middle
from svdconvert.merging.sums import weighted_sum


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """Weighted sum without outliers and small entries."""
    return (weighted_sum(changes, settings) for changes in keep_middle(blocks, settings))


METHOD = MergeMethod(
    summary="weighted sum without outliers and small entries",
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
