"""Applying what an adapter changes to a matrix.  O: out features, I: in features, R: rank."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite, nan, sqrt

import torch
from torch import Tensor

from svdconvert.linalg.blocks import energy_of, in_float32, row_blocks, rows_of_a_block
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.gemm import add_matmul_f32, matmul_f32
from svdconvert.linalg.rounding import stochastic

_ENTRIES = 1 << 20  # that are measured at a time
Product = tuple[Tensor, Tensor]
"""(left_OR, right_RI)."""


def residual_(weight_OI: Tensor, factors: Factors, scale: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(weight - scale * B A in float32, rounded once to `dtype`; Frobenius norm of the rounding errors).

    Overwrites the weight if the dtype is the same, or if it is float32.
    """
    left, right = factors.folded()
    # Products of views that are stored column by column are twice as slow, and more with many columns.
    left = (left * -scale).contiguous()
    right = right.contiguous()
    residual_OI = weight_OI if weight_OI.dtype == dtype else torch.empty_like(weight_OI, dtype=dtype)

    def rounded_off() -> Iterator[Tensor]:
        for rows, part in in_float32(weight_OI):
            add_matmul_f32(part, left[rows], right)
            residual_OI[rows] = part
            if dtype != torch.float32:
                yield part.sub_(residual_OI[rows])

    return residual_OI, sqrt(energy_of(rounded_off()))


def as_lora(after: Factors, scale: float, before: Factors, scale0: float) -> tuple[Tensor, Tensor]:
    """(B, A) of rank 2R with B @ A = scale * after - scale0 * before: a LoRA of scale 1.

    B = [sB - s0B0, s0B0] and A = [A; A - A0]: no large terms cancel in the product, in any dtype that it is
    rounded to, and what did not change is exactly zero. The rank is R if the start was zero, or if A did
    not change (the change is then in B alone).
    """
    (left, right) = after.folded()
    (left0, right0) = before.folded()
    left = left * scale
    left0 = left0 * scale0
    if not left0.any():
        return left, right
    if right.shape != right0.shape:
        return torch.cat([left, -left0], dim=1), torch.cat([right, right0], dim=0)
    moved = right - right0
    if not moved.any():
        return left - left0, right
    return torch.cat([left - left0, left0], dim=1), torch.cat([right, moved], dim=0)


@dataclass(frozen=True, slots=True)
class Realised:
    """What rounding leaves of an update, in Frobenius norms and angles."""

    size: float
    """||intended||."""
    cosine: float
    """Between the intended and the realised update; NaN if a value of either is NaN or infinite."""
    kept: float
    """Projection of the realised update on the intended one, as a share of it: 1 if rounding is unbiased."""


def merged_(
    weight_OI: Tensor,
    adapter: Product,
    dtype: torch.dtype,
    update: Product | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Realised | None]:
    """(weight + left @ right in float32, rounded once to `dtype`; how much of the update is in it).

    `update` is the part of that product that is meant to change the model; by default all of it. With a
    `generator` the rounding is stochastic. Overwrites the weight if the dtype is the same. An entry whose
    change is zero keeps its bits, including the sign of a zero; without any change the second value is None.
    """
    left_OR, right_RI = (factor.contiguous() for factor in adapter)
    merged_OI = weight_OI if weight_OI.dtype == dtype else torch.empty_like(weight_OI, dtype=dtype)
    if not left_OR.any():
        return merged_OI.copy_(weight_OI), None
    # x - (+0) is x for every x; x + 0 would turn -0 into +0.
    opposite_OR = -left_OR
    sum_OI = _block(weight_OI)
    sums = _Sums()
    for rows in row_blocks(weight_OI):
        count = rows.stop - rows.start
        change = matmul_f32(opposite_OR[rows], right_RI)
        exact = sum_OI[:count].copy_(weight_OI[rows]).sub_(change)
        merged_OI[rows] = exact if generator is None else stochastic(exact, dtype, generator)
        if update is not None:
            change = matmul_f32(-update[0][rows], update[1])
        sums.add(change, exact.sub_(merged_OI[rows]))
    return merged_OI, sums.realised()


def realised_change(before: Tensor, exact: Tensor, rounded: Tensor) -> Realised | None:
    """What rounding leaves of the change from `before` to `exact`, both in float32; None if there is none."""
    return realised_changes([(before, exact, rounded)])


def realised_changes(blocks: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Realised | None:
    """The same of a tensor that is given in blocks."""
    sums = _Sums()
    for block in blocks:
        flat = [tensor.reshape(-1) for tensor in block]
        for start in range(0, block[0].numel(), _ENTRIES):
            old, goal, got = (tensor[start : start + _ENTRIES] for tensor in flat)
            change = goal - old
            sums.uu += float(torch.dot(change, change))
            if got.dtype != torch.float32:
                error = got.float() - goal
                sums.ue += float(torch.dot(change, error))
                sums.ee += float(torch.dot(error, error))
    return sums.realised()


def measured(update: Product, blocks: Iterable[tuple[slice, Tensor]]) -> Realised | None:
    """How much of `update` a stored matrix holds; None if nothing was to change.

    blocks: (rows, merged matrix in float32 minus the stored one), for all rows.
    """
    sums = _Sums()
    for rows, lost in blocks:
        sums.add(matmul_f32(-update[0][rows], update[1]), lost)
    return sums.realised()


@dataclass(slots=True)
class _Sums:
    """Sums in float64 over the blocks of a matrix, of the update u and the rounding error e."""

    uu: float = 0.0
    ue: float = 0.0
    ee: float = 0.0

    def add(self, minus_u: Tensor, minus_e: Tensor) -> None:
        """Add one block; each row is summed in float32, the rows in float64."""
        self.uu += energy_of([minus_u])
        self.ee += energy_of([minus_e])
        self.ue += float(torch.linalg.vecdot(minus_u, minus_e).double().sum())

    def realised(self) -> Realised | None:
        """None if nothing was to change."""
        if self.uu == 0.0:
            return None
        along = self.uu + self.ue
        realised = self.uu + 2.0 * self.ue + self.ee
        if not isfinite(realised):
            return Realised(sqrt(self.uu), nan, nan)
        cosine = along / sqrt(self.uu * realised) if realised > 0.0 else 0.0
        return Realised(sqrt(self.uu), cosine, along / self.uu)


def _block(matrix_OI: Tensor) -> Tensor:
    """An uninitialised float32 buffer for one block of rows."""
    rows = rows_of_a_block(matrix_OI)
    columns = matrix_OI.shape[1]
    return torch.empty(rows, columns, dtype=torch.float32, device=matrix_OI.device)
