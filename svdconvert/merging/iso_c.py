"""Iso-C: the sum of all changes with all singular values made equal (arXiv:2502.04959)."""

from collections.abc import Sequence

from torch import Tensor

from svdconvert.merging.base import BOTH, MergeMethod, Settings
from svdconvert.merging.parameters import LAMBDA, WEIGHT
from svdconvert.merging.spectra import triplets
from svdconvert.merging.sums import weighted_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """lambda * mean(S) U V^T, with U S V^T the SVD of sum_t w_t D_t.

    The mean is over the singular values above zero: a sum of adapters has no other directions. Of a tensor
    that is no matrix it is the weighted mean, as in the authors' code.
    """
    total = weighted_sum(changes, settings)
    if total.dim() != 2:
        return total.div_(len(changes))
    left, sigma, right = triplets(total)
    return (left * sigma.mean()) @ right if len(sigma) else total


METHOD = MergeMethod(
    summary="sum of the changes with equal singular values",
    paper="arXiv:2502.04959",
    takes=BOTH,
    parameters=(WEIGHT, LAMBDA),
    changes=merge,
)
