"""TSV-M: the singular vectors of all changes, made orthonormal together (arXiv:2412.00081)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdconvert.merging.base import BOTH, MergeMethod, Settings
from svdconvert.merging.parameters import LAMBDA, WEIGHT
from svdconvert.merging.spectra import joined_rows, multiply_rows_, orthonormalising, right_vectors
from svdconvert.merging.sums import weighted_sum


def merge(changes: Sequence[Tensor], settings: Settings) -> Tensor:
    """lambda * U' diag(w_1 S_1, ..., w_T S_T) V' with U' and V' orthonormal.

    Of each of the T changes min(O, I) / T triplets are kept, or as many as it has. U' and V' are the
    orthonormal matrices nearest to [U_1, ..., U_T] and to [V_1; ...; V_T]. Of a tensor that is no matrix it
    is the weighted mean, as in the authors' code. Overwrites the changes.
    """
    if changes[0].dim() != 2:
        return weighted_sum(changes, settings).div_(len(changes))
    if changes[0].shape[0] < changes[0].shape[1]:
        return _merge_long([change.T for change in changes], settings).T
    return _merge_long(changes, settings)


def _merge_long(changes_LS: Sequence[Tensor], settings: Settings) -> Tensor:
    """`merge` of matrices with L >= S. The left vectors are stored in the changes, then the result is."""
    kept = max(1, min(settings.shape) // len(changes_LS))
    lefts = []
    rights = []
    sizes = []
    for change_LS, weight in zip(changes_LS, settings.numbers("weight"), strict=True):
        sigma, right_SR = (part[..., :kept] for part in right_vectors(change_LS))
        lefts.append(multiply_rows_(change_LS, right_SR / sigma))
        rights.append(right_SR)
        sizes.append(sigma * (weight * settings.number("lambda")))
    right_SK = torch.cat(rights, dim=1)
    gram_KK = right_SK.new_zeros(right_SK.shape[1], right_SK.shape[1])
    for _, part in joined_rows(lefts):
        gram_KK += part.double().T @ part.double()
    right_SK = right_SK @ orthonormalising(right_SK.T @ right_SK)
    turn_KS = (orthonormalising(gram_KK) * torch.cat(sizes) @ right_SK.T).to(changes_LS[0].dtype)
    for rows, part in joined_rows(lefts):
        changes_LS[0][rows] = part @ turn_KS
    return changes_LS[0]


METHOD = MergeMethod(
    summary="singular vectors of all changes, made orthonormal",
    paper="arXiv:2412.00081",
    takes=BOTH,
    parameters=(WEIGHT, LAMBDA),
    changes=merge,
)
