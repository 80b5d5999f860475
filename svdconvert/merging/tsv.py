"""TSV-M: the singular vectors of all changes, made orthonormal together (arXiv:2412.00081)."""

from collections.abc import Sequence

from torch import Tensor

from svdconvert.merging.base import BOTH, MergeMethod, Settings
from svdconvert.merging.parameters import LAMBDA, WEIGHT
from svdconvert.merging.spectra import joined, nearest_orthonormal, triplets
from svdconvert.merging.sums import weighted_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """lambda * U' diag(w_1 S_1, ..., w_T S_T) V' with U' and V' orthonormal.

    Of each of the T changes min(O, I) / T triplets are kept, or as many as it has. U' and V' are the
    orthonormal matrices nearest to [U_1, ..., U_T] and to [V_1; ...; V_T]. Of a tensor that is no matrix it
    is the weighted mean, as in the authors' code.
    """
    weights = settings.numbers("weight")
    if changes[0].dim() != 2:
        return weighted_sum(changes, settings).div_(len(changes))
    kept = max(1, min(settings.shape) // len(changes))
    parts = [triplets(change, kept) for change in changes]
    scaled = [
        (left, sigma * weight, right) for (left, sigma, right), weight in zip(parts, weights, strict=True)
    ]
    left, sigma, right = joined(scaled)
    core = nearest_orthonormal(left) * (settings.number("lambda") * sigma)
    return core @ nearest_orthonormal(right.T).T


METHOD = MergeMethod(
    summary="singular vectors of all changes, made orthonormal",
    paper="arXiv:2412.00081",
    takes=BOTH,
    parameters=(WEIGHT, LAMBDA),
    changes=merge,
)
