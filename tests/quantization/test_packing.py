"""Codes in words of 32 bits, against Python's integers."""

import pytest
import torch
from torch import Tensor

from svdconvert.quantization.packing import pack, unpack


def by_hand(row: list[int], bits: int, count: int) -> list[int]:
    """The codes of a row as one large integer."""
    stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
    return [stream >> (bits * place) & ((1 << bits) - 1) for place in range(count)]


@pytest.mark.parametrize("count", [1, 7, 32, 61])
@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_one_stream_of_bits(bits: int, count: int) -> None:
    words: Tensor = torch.randint(-(2**31), 2**31, (3, -(-count * bits // 32)), dtype=torch.int32)
    found = unpack(words, bits, count)
    assert found.tolist() == [by_hand(row, bits, count) for row in words.tolist()]


@pytest.mark.parametrize("count", [1, 7, 32, 61])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_the_inverse(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (3, -(-count * bits // 32))
    assert torch.equal(unpack(words, bits, count), codes)
