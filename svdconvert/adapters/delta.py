"""What an adapter changes, applied to a matrix.  O: out features, I: in features, R: rank."""

from math import sqrt

import torch
from torch import Tensor

from svdconvert.factors import Factors
from svdconvert.linalg.blocks import in_float32, row_blocks, rows_of_a_block, total_energy


def residual_(weight_OI: Tensor, factors: Factors, scale: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(weight - scale * product in float32 with one rounding to `dtype`, ||what the rounding lost||_F).

    In place where the dtype stays.
    """
    left, right = factors.folded()
    room_OI = weight_OI if weight_OI.dtype == dtype else torch.empty_like(weight_OI, dtype=dtype)
    lost = 0.0
    for rows, part in in_float32(weight_OI):
        exact = part.addmm_(left[rows], right, alpha=-scale)
        room_OI[rows] = exact
        if dtype != torch.float32:
            lost += total_energy(exact.sub_(room_OI[rows]))
    return room_OI, sqrt(lost)


def as_lora(after: Factors, scale: float, before: Factors, scale0: float) -> tuple[Tensor, Tensor]:
    """(B, A) of rank 2R with B @ A = scale * after - scale0 * before: a LoRA of scale 1.

    B = [sB - s0B0, s0B0] over A = [A; A - A0]: no two large terms cancel in the product, whatever it
    is rounded to, and what did not move is exactly zero. Rank R where the start was zero, or where A
    did not move (then the change is all in B).
    """
    (left, right), (left0, right0) = after.folded(), before.folded()
    left, left0 = left * scale, left0 * scale0
    if not left0.any():
        return left, right
    if right.shape != right0.shape:
        return torch.cat([left, -left0], dim=1), torch.cat([right, right0], dim=0)
    turned = right - right0
    if not turned.any():
        return left - left0, right
    return torch.cat([left - left0, left0], dim=1), torch.cat([right, turned], dim=0)


def merged_(weight_OI: Tensor, left_OR: Tensor, right_RI: Tensor, dtype: torch.dtype) -> Tensor:
    """weight + left @ right in float32, one rounding to `dtype`; in place where the dtype stays.

    Where the product is zero the weight's own bits stay, the sign of a zero included.
    """
    merged_OI = weight_OI if weight_OI.dtype == dtype else torch.empty_like(weight_OI, dtype=dtype)
    if not left_OR.any():
        return merged_OI.copy_(weight_OI)
    # x - (+0) is x for every x, and x + 0 is not: it takes the sign from -0.
    opposite_OR = -left_OR
    change_OI, sum_OI = _block(weight_OI), _block(weight_OI)
    for rows in row_blocks(weight_OI):
        count = rows.stop - rows.start
        change = torch.mm(opposite_OR[rows], right_RI, out=change_OI[:count])
        merged_OI[rows] = sum_OI[:count].copy_(weight_OI[rows]).sub_(change)
    return merged_OI


def _block(matrix_OI: Tensor) -> Tensor:
    """Room for one block of rows in float32."""
    rows, columns = rows_of_a_block(matrix_OI), matrix_OI.shape[1]
    return torch.empty(rows, columns, dtype=torch.float32, device=matrix_OI.device)
