"""Finding the entries of largest magnitude of tensors that are read in blocks.

The magnitude at a rank is found exactly, by its bits: each pass counts how often every value of the next 16
bits occurs among the entries whose higher bits are known (radix selection). Two passes find it in float32,
four in float64, and nothing of the size of a tensor is in memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

_DIGIT = 16  # bits
_VALUES = 1 << _DIGIT
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True, slots=True)
class Cut:
    """The entries of magnitudes above `threshold`, and the first `equal` of those that have it."""

    threshold: float
    equal: int = 0


class Largest:
    """The mask of the largest entries of a tensor, asked for block by block from the first to the last."""

    def __init__(self, cut: Cut) -> None:
        self._threshold = cut.threshold
        self._equal = cut.equal

    def __call__(self, block: Tensor) -> Tensor:
        """True for the entries of this block that are among the largest."""
        magnitudes = block.abs().reshape(-1)
        kept = magnitudes > self._threshold
        if self._equal:
            places = (magnitudes == self._threshold).nonzero().reshape(-1)[: self._equal]
            kept[places] = True
            self._equal -= len(places)
        return kept.reshape(block.shape)


def first_largest(tensor: Tensor, count: int) -> Tensor:
    """True for the `count` entries of largest magnitude; of equal ones the first."""
    return Largest(find_cuts([[tensor]], [(0, count)], tensor.numel())[0])(tensor)


def find_cuts(
    blocks: Iterable[Sequence[Tensor]], wanted: Sequence[tuple[int, int]], entries: int
) -> list[Cut]:
    """For each (tensor, count) the cut above which this tensor has `count` entries.

    blocks: parts of all tensors, float32 or float64; each iteration is another pass. `entries` is how many
    each tensor has.
    """
    searches = {
        number: _Search(tensor, count) for number, (tensor, count) in enumerate(wanted) if 0 < count < entries
    }
    if searches:
        dtype = next(iter(blocks))[0].dtype
        for shift in range(8 * dtype.itemsize - _DIGIT, -1, -_DIGIT):
            _narrow(list(searches.values()), blocks, dtype, shift)
        for search in searches.values():
            search.threshold = float(torch.tensor(search.bits, dtype=_INTEGERS[dtype]).view(dtype))
    none = Cut(inf)
    every = Cut(-1.0)
    return [
        Cut(searches[number].threshold, searches[number].left)
        if number in searches
        else (every if count >= entries else none)
        for number, (_, count) in enumerate(wanted)
    ]


@dataclass(slots=True)
class _Search:
    """The search for one magnitude."""

    tensor: int
    left: int
    """Its rank among the entries whose higher bits are `bits`: 1 for the largest of them."""
    bits: int = 0
    threshold: float = inf


def _narrow(
    searches: Sequence[_Search], blocks: Iterable[Sequence[Tensor]], dtype: torch.dtype, shift: int
) -> None:
    """One pass, which finds 16 more bits of every magnitude: those at `shift` and above."""
    known = {(search.tensor, search.bits) for search in searches}
    counts: dict[tuple[int, int], Tensor] = {}
    for parts in blocks:
        for tensor, bits in known:
            higher = parts[tensor].abs().reshape(-1).view(_INTEGERS[dtype]) >> shift
            if shift + _DIGIT < 8 * dtype.itemsize:
                higher = higher[(higher >> _DIGIT) == bits] & (_VALUES - 1)
            found = torch.bincount(higher, minlength=_VALUES)
            counts[tensor, bits] = counts[tensor, bits] + found if (tensor, bits) in counts else found
    for search in searches:
        from_top = counts[search.tensor, search.bits].flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, search.left))
        search.left -= int(from_top[place - 1]) if place else 0
        search.bits = (search.bits << _DIGIT) | (_VALUES - 1 - place)
