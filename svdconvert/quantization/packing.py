"""Codes of a few bits, packed into words of 32 bits, the lowest bits first."""

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row of words, as uint8: (..., words) int32 -> (..., count).

    A row is one stream of bits, so a code may lie in two words if `bits` does not divide 32.
    """
    if bits in (2, 4, 8):
        # A dimension of one element may have any stride, which `view` refuses, until the tensor is cloned.
        bytes_ = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (bytes_[..., None] >> shifts & (1 << bits) - 1).flatten(-2)[..., :count]
    begin = torch.arange(count) * bits
    word = begin // 32
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    low = wide[..., word] >> begin % 32
    high = wide[..., word + 1] << 32 - begin % 32
    return ((low | high) & (1 << bits) - 1).to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`: (..., count) codes below 2^bits -> (..., ceil(count * bits / 32)) int32."""
    count = codes.shape[-1]
    begin = torch.arange(count) * bits
    word = begin // 32
    length = -(-count * bits // 32)
    wide = torch.zeros(*codes.shape[:-1], length + 1, dtype=torch.int64)
    shifted = codes.long() << begin % 32
    wide.index_add_(-1, word, shifted & 0xFFFFFFFF)
    wide.index_add_(-1, word + 1, shifted >> 32)
    return wide[..., :length].to(torch.int32)
