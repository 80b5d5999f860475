"""Task arithmetic: the weighted sum of all changes (arXiv:2212.04089)."""

from collections.abc import Sequence

from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, MergeMethod, Settings
from svdconvert.merging.parameters import LAMBDA, MASK, WEIGHT, normalize
from svdconvert.merging.sums import weighted_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """Weighted sum of the changes."""
    return weighted_sum(changes, settings)


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
    changes=merge,
    by_entry=True,
)
