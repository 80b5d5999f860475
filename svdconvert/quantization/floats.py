"""Floats of four and eight bits that no torch dtype covers on all devices: E2M1, and the exponents E8M0.

OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1.
"""

from math import nan

import torch
from torch import Tensor

# By the bit pattern s e e m.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_AT_ONCE = 1 << 20  # values that are packed at the same time; an even number
_BIAS = 127
_MANTISSA = 23  # bits of a float32
# By the stored exponent; the first one is a subnormal number.
_POWERS = torch.tensor([*(2.0 ** (stored - _BIAS) for stored in range(255)), nan])
_HALF_STEP = 1 << (_MANTISSA - 2)  # half of the last of one bit of mantissa


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Two values of every byte, that of the low nibble first: (..., bytes) -> (..., 2 * bytes) float32."""
    bytes_ = packed.contiguous().view(torch.uint8)
    return E2M1[torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).flatten(-2).int()]


def pack_e2m1(values: Tensor) -> Tensor:
    """The nearest values, ties to the even code, in bytes: the inverse of `unpack_e2m1`. Saturates at 6."""
    packed = torch.empty(*values.shape[:-1], values.shape[-1] // 2, dtype=torch.uint8)
    found = packed.view(-1)
    flat = values.reshape(-1)
    for start in range(0, len(flat), _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        size = part.abs()
        below = torch.bucketize(size, _MIDDLES, out_int32=True)
        above = torch.bucketize(size, _MIDDLES, out_int32=True, right=True)
        sign = part.signbit().to(torch.uint8) << 3
        code = torch.where(below % 2 == 0, below, above).to(torch.uint8) | sign
        found[start // 2 : (start + len(part)) // 2] = code[::2] | code[1::2] << 4
    return packed


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^(e - 127) of stored exponents (uint8, or E8M0), in float32; 255 is NaN."""
    return _POWERS[exponents.view(torch.uint8).int()]


def exponents(scales: Tensor) -> Tensor:
    """The stored exponents (uint8) of powers of two in float32."""
    return (torch.frexp(scales).exponent - 1 + _BIAS).clamp(0, 254).to(torch.uint8)


def scale_of_largest(largest: Tensor, top_exponent: int) -> Tensor:
    """The power of two by which a block with this largest magnitude is divided.

    The magnitude is rounded to one bit of mantissa before its exponent is taken, as compressed-tensors'
    generate_mx_scales does, so that fewer values saturate; `top_exponent` is that of the element type's
    largest value (2 for E2M1, 8 for E4M3). The smallest scale is 2^-127.
    """
    rounded = (largest.float().view(torch.int32) + _HALF_STEP) & (0xFF << _MANTISSA)
    return _POWERS[((rounded >> _MANTISSA) - top_exponent).clamp(0, 2 * _BIAS)]
