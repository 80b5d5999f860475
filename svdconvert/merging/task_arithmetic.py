"""Task arithmetic: the weighted sum of all changes (arXiv:2212.04089)."""

from collections.abc import Iterator

from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, Blocks, MergeMethod, Settings
from svdconvert.merging.parameters import LAMBDA, MASK, WEIGHT, normalize
from svdconvert.merging.sums import weighted_sum


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """Weighted sum of the changes."""
    return (weighted_sum(changes, settings) for changes in blocks)


METHOD = MergeMethod(
    summary="weighted sum of the changes",
    paper="arXiv:2212.04089",
    takes=CHECKPOINTS,
    parameters=(
        WEIGHT,
        LAMBDA,
        normalize(False),
        MASK,
    ),
    blocks=merge,
)
