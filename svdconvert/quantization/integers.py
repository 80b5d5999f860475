"""Integer codes with scales and zero points for groups of a row: w = (q - z) * scale."""

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import REAL, TensorInfo
from svdconvert.errors import CheckpointError

_AT_ONCE = 1 << 22  # values that are quantised at the same time


def group_size(codes: tuple[int, ...], scale: TensorInfo) -> int:
    """Columns per scale of (O, I) codes. Raises CheckpointError if the scales do not fit the codes."""
    rows, columns = codes
    if scale.dtype not in REAL:
        raise CheckpointError(f"{scale.name} is stored as {scale.dtype}, which is no scale of integer codes")
    if scale.shape in ((), (1,), (1, 1), (rows,), (rows, 1)):
        return max(columns, 1)
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise CheckpointError(
            f"{scale.name} has the shape {list(scale.shape)}, which does not divide its weight of the shape "
            f"{[rows, columns]} into groups; fetch the checkpoint again"
        )
    return columns // scale.shape[1]


def per_row(stored: Tensor, rows: int) -> Tensor:
    """Scales or zero points as (rows, groups); a single one is repeated for every row."""
    grid = stored.reshape(1 if stored.numel() == 1 else rows, -1)
    return grid.expand(rows, -1)


def quantize(
    weight_OI: Tensor, bits: int, size: int, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, zero point) of a matrix in groups of `size` columns, as signed integers of `bits` bits.

    `scale` (rows, groups) and `zero` are the stored ones, None for zero if the codes are symmetric. The rule
    is that of compressed-tensors: scale = largest magnitude / (2^bits - 1) * 2, or (max - min) / (2^bits - 1)
    with a zero point. Because that rule does not give back the scale of codes that it has rounded, a group
    keeps its stored scale if that represents the weights with a smaller error. A single scale belongs to the
    entire matrix.
    """
    if scale.numel() == 1:
        return _quantize(weight_OI.reshape(1, 1, -1), bits, scale, zero, weight_OI.shape)
    step = max(1, _AT_ONCE // max(1, weight_OI.shape[1]))
    done = []
    for start in range(0, len(weight_OI), step):
        rows = slice(start, start + step)
        values = weight_OI[rows].reshape(len(weight_OI[rows]), -1, size)
        own_zero = None if zero is None else zero[rows]
        done.append(_quantize(values, bits, scale[rows], own_zero, weight_OI[rows].shape))
    zeros = [each for _, _, each in done if each is not None]
    codes = torch.cat([each for each, _, _ in done])
    return codes, torch.cat([each for _, each, _ in done]), torch.cat(zeros) if zeros else None


def _quantize(
    values: Tensor, bits: int, scale: Tensor, zero: Tensor | None, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`quantize` of values (rows, groups, columns of a group), whose codes get the `shape`."""
    ruled_scale, ruled_zero = _rule(values, bits, scale.dtype, with_zero=zero is not None)
    codes, error = _round(values, bits, ruled_scale, ruled_zero)
    kept_scale = scale.float()[..., None]
    kept_zero = zero.float()[..., None] if zero is not None else torch.zeros(())
    kept_codes, kept_error = _round(values, bits, kept_scale, kept_zero)
    keep = kept_error <= error
    codes = torch.where(keep, kept_codes, codes).to(torch.int8).reshape(shape)
    new_zero = torch.where(keep, kept_zero, ruled_zero)[..., 0].to(torch.int8) if zero is not None else None
    return codes, torch.where(keep, kept_scale, ruled_scale)[..., 0].to(scale.dtype), new_zero


def _rule(values: Tensor, bits: int, dtype: torch.dtype, *, with_zero: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero point) of groups along the last dimension, the scale as rounded to its element type."""
    steps = (1 << bits) - 1
    if not with_zero:
        scale = values.abs().amax(-1, keepdim=True) / (steps / 2)
        return _representable(scale, dtype), torch.zeros(())
    low = values.amin(-1, keepdim=True).clamp(max=0.0)
    high = values.amax(-1, keepdim=True).clamp(min=0.0)
    scale = _representable((high - low) / steps, dtype)
    smallest = -(1 << (bits - 1))
    return scale, (smallest - low / scale).clamp(smallest, smallest + steps).round()


def _representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to `dtype`, as float32; the smallest normal number instead of zero."""
    rounded = scale.to(dtype).float()
    return torch.where(rounded > 0, rounded, torch.finfo(dtype).tiny)


def _round(values: Tensor, bits: int, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """(codes in float32, squared error of every group)."""
    top = (1 << (bits - 1)) - 1
    codes = (values / scale + zero).round().clamp(-top - 1, top)
    error = ((codes - zero) * scale - values).square().sum(-1, keepdim=True)
    return codes, error.nan_to_num(torch.inf)
