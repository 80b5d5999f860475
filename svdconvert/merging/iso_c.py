"""Iso-C: the sum of all changes with all singular values made equal (arXiv:2502.04959)."""

from collections.abc import Sequence

from torch import Tensor

from svdconvert.merging.base import BOTH, MergeMethod, Settings
from svdconvert.merging.parameters import LAMBDA, WEIGHT
from svdconvert.merging.spectra import multiply_rows_, right_vectors
from svdconvert.merging.sums import weighted_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """lambda * mean(S) U V^T, with U S V^T the SVD of sum_t w_t D_t.

    The mean is over the singular values above zero: a sum of adapters has no other directions. Of a tensor
    that is no matrix it is the weighted mean, as in the authors' code. Overwrites the changes.
    """
    total = weighted_sum(changes, settings)
    if total.dim() != 2:
        return total.div_(len(changes))
    long_LS = total.T if total.shape[0] < total.shape[1] else total
    sigma, right_SR = right_vectors(long_LS)
    if len(sigma):
        multiply_rows_(long_LS, right_SR / sigma * sigma.mean() @ right_SR.T)
    return total


METHOD = MergeMethod(
    summary="sum of the changes with equal singular values",
    paper="arXiv:2502.04959",
    takes=BOTH,
    parameters=(WEIGHT, LAMBDA),
    changes=merge,
)
