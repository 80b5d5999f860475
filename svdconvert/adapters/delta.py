"""What an adapter changes, applied to a matrix.  O: out features, I: in features, R: rank."""

from collections.abc import Iterator

import torch
from torch import Tensor

from svdconvert.factors import Factors

_BLOCK = 1 << 20  # elements of a matrix in work at a time: 4 MB in float32, which stays in cache


def subtract_(weight_OI: Tensor, factors: Factors, scale: float) -> Tensor:
    """weight - scale * product in float32, (O, I), in place: the residual before it is rounded."""
    left, right = factors.folded()
    return weight_OI.addmm_(left, right, alpha=-scale)


def shifted_(  # noqa: PLR0913 (the formula has these six)
    weight_OI: Tensor, after: Factors, scale: float, before: Factors, scale0: float, dtype: torch.dtype
) -> Tensor:
    """weight + (scale * after - scale0 * before) in float32, one rounding to `dtype`.

    The two products are computed apart by the same kernel, and where they agree the weight's own
    bits stay, the sign of a zero included: an untrained adapter changes nothing. In place where the dtype
    stays.
    """
    (left, right), (left0, right0) = after.folded(), before.folded()
    merged_OI = _room(weight_OI, dtype)
    for rows in row_blocks(weight_OI):
        product = _product(left[rows], right, scale)
        change = product.sub_(_product(left0[rows], right0, scale0))
        moved = (weight_OI[rows] + change).to(dtype)
        merged_OI[rows] = torch.where(change == 0, weight_OI[rows].to(dtype), moved)
    return merged_OI


def restored_(residual_OI: Tensor, factors: Factors, scale: float, dtype: torch.dtype) -> Tensor:
    """residual + scale * product in float32, one rounding to `dtype`; in place where the dtype stays."""
    left, right = factors.folded()
    merged_OI = _room(residual_OI, dtype)
    for rows in row_blocks(residual_OI):
        merged_OI[rows] = _product(left[rows], right, scale).add_(residual_OI[rows]).to(dtype)
    return merged_OI


def _room(matrix_OI: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix_OI if matrix_OI.dtype == dtype else torch.empty_like(matrix_OI, dtype=dtype)


def row_blocks(matrix_OI: Tensor) -> Iterator[slice]:
    """Slices of rows that bound the float32 copies of a large matrix."""
    rows, columns = matrix_OI.shape
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    product = left @ right
    return product if scale == 1.0 else product.mul_(scale)


def as_lora(after: Factors, scale: float, before: Factors, scale0: float) -> tuple[Tensor, Tensor]:
    """(B, A) of rank 2R with B @ A = scale * after - scale0 * before: a LoRA of scale 1.

    Rank R where the start was zero, or where A did not move (then the change is all in B).
    """
    (left, right), (left0, right0) = after.folded(), before.folded()
    if not left0.any():
        return left * scale, right
    if torch.equal(right, right0):
        return left * scale - left0 * scale0, right
    return torch.cat([left * scale, left0 * -scale0], dim=1), torch.cat([right, right0], dim=0)
