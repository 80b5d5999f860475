"""NF4 and FP4, the 4-bit codes of bitsandbytes: quantising, packing and decoding, with its bytes on disk.

A weight is cut into blocks of 64 values in row-major order, across rows. Each block is divided by its largest
magnitude, and every quotient becomes the nearest of 16 numbers (QLoRA, arXiv:2305.14314, section 3). With
double quantisation the largest magnitudes, less their mean, are stored in 8 bits, in blocks of 256.

The results are those of bitsandbytes 0.50, bit for bit; its CPU kernel for the 8-bit magnitudes alone, which
looks values up in a table, sometimes takes the second nearest number if two are about equally near.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import gcd, prod
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorInfo

Kind = Literal["nf4", "fp4"]

CODE_BOOKS: Mapping[str, Tensor] = {
    "nf4": torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ]
    ),
    "fp4": torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]).div(12.0).repeat(2)
    * torch.tensor([1.0, -1.0]).repeat_interleave(8),
}
"""Kind -> the number of each of its 16 codes (float32).

A code of FP4 is a sign, two exponent bits and a mantissa bit."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The sizes of a block that bitsandbytes reads."""
BLOCK = 64
"""The size of a block that it writes."""
NESTED_BLOCK = 256
"""How many magnitudes form a block of double quantisation."""

_AT_ONCE = 1 << 18  # values that are processed at once, so that the working copies stay in the cache
_PARTS = 1 << 13  # of [-1, 1], in which the code of a number is looked up
_NEAR = 0.01  # of a part; rounding to float32 moves a value by less
_SEARCHED = 255  # instead of the code of a part in which a number must be searched
_LEAST = 1e-38  # instead of the largest magnitude of a block of zeros, as in bitsandbytes
_OFFSET_LENGTH = 24  # characters of a float in JSON, at most


@dataclass(frozen=True, slots=True)
class Rule:
    """How weights are quantised to 4 bits."""

    kind: Kind = "nf4"
    blocksize: int = BLOCK
    double: bool = False
    """True for double quantisation."""

    @property
    def bits(self) -> float:
        """Bits per weight of a large matrix."""
        return 4.0 + (8.0 + 32.0 / NESTED_BLOCK if self.double else 32.0) / self.blocksize


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight in 4 bits."""

    rule: Rule
    shape: tuple[int, ...]
    packed: Tensor
    """uint8 [(n + 1) / 2]: two codes per byte, the first one in the upper four bits."""
    scales: Tensor
    """The largest magnitude of each block, float32 [ceil(n / blocksize)]; uint8 with double quantisation."""
    nested_scales: Tensor | None = None
    """float32 [ceil(blocks / 256)] with double quantisation."""
    offset: float = 0.0
    """What double quantisation subtracted from the magnitudes."""

    def decode(self, rows: slice | None = None) -> Tensor:
        """The values in float32, of the given rows of the first dimension or of all."""
        first = 0 if rows is None else rows.start
        last = self.shape[0] if rows is None else rows.stop
        width = prod(self.shape[1:])
        size = self.rule.blocksize
        block = first * width // size
        magnitudes = self._magnitudes(block, -(-last * width // size))
        shift = block * size
        packed = self.packed[shift // 2 :]
        book = CODE_BOOKS[self.rule.kind]
        flat = decode(packed, magnitudes, book, size, first * width - shift, last * width - shift)
        return flat.reshape(last - first, *self.shape[1:])

    def _magnitudes(self, first: int, last: int) -> Tensor:
        """The largest magnitudes of the blocks number `first` to `last`, float32."""
        codes = self.scales[first:last]
        if self.nested_scales is None:
            return codes
        numbers = torch.arange(first, last, device=codes.device) // NESTED_BLOCK
        levels = dynamic_map().to(codes.device)
        return undo_double(codes, levels, self.nested_scales[numbers], self.offset, 1)

    def tensors(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds instead of the weight `name`; see `stored_infos`.

        `dtype` is what a program decodes them to.
        """
        fields = state_fields(self.rule, self.shape, dtype, self.offset)
        infos = stored_infos(name, self.shape, self.rule, dtype)
        values = [self.packed[:, None], self.scales, CODE_BOOKS[self.rule.kind]]
        if self.nested_scales is not None:
            values += [self.nested_scales, dynamic_map()]
        values.append(encode_state(fields, infos[-1].shape[0]))
        return {info.name: value for info, value in zip(infos, values, strict=True)}


def encode(weight: Tensor, rule: Rule) -> Quantized:
    """A weight of any float dtype and shape in 4 bits. Its values must be finite."""
    return encode_rows(tuple(weight.shape), rule, weight.device, lambda rows: weight[rows])


def encode_rows(
    shape: tuple[int, ...], rule: Rule, device: torch.device, rows_of: Callable[[slice], Tensor]
) -> Quantized:
    """The same for a weight that is computed some rows at a time: `rows_of` returns those of a slice."""
    width = prod(shape[1:])
    size = rule.blocksize
    packed = torch.empty((prod(shape) + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-prod(shape) // size), device=device)
    for rows in aligned_rows(shape[0], width, size, device):
        flat = rows_of(rows).reshape(-1)
        start = rows.start * width
        is_odd = flat.numel() % 2
        padded = torch.nn.functional.pad(flat, (0, 1)) if is_odd else flat  # as bitsandbytes does
        codes, largest = quantize(padded, rule.kind, size)
        packed[start // 2 : (start + padded.numel()) // 2] = pack(codes)
        absmax[start // size : start // size + largest.numel()] = largest
    if not rule.double:
        return Quantized(rule, shape, packed, absmax)
    return Quantized(rule, shape, packed, *double_quantize(absmax))


def aligned_rows(rows: int, width: int, blocksize: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that begin with a block and stay in the cache; all rows at once on a GPU."""
    unit = blocksize // gcd(blocksize, width)
    step = unit * max(1, _AT_ONCE // (unit * width)) if device.type == "cpu" else rows
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def quantize(flat: Tensor, kind: str, blocksize: int = BLOCK) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n], largest magnitude of each block float32 [ceil(n / blocksize)]) of a vector [n].

    A quotient in the middle of two numbers becomes the smaller one. The vector has any float dtype.
    """
    return _nearest(flat, _levels(kind, flat.device), blocksize)


class _Levels:
    """The numbers of a code book, among which the nearest one is found."""

    def __init__(self, book: Tensor) -> None:
        sorted_, order = book.sort(stable=True)
        self._bounds = (sorted_[:-1] + sorted_[1:]) / 2
        self._codes = order.to(torch.uint8)
        self._table = _table(self._bounds, self._codes) if book.device.type == "cpu" else self._codes

    def find(self, values: Tensor, codes: Tensor) -> None:
        """Write the codes of the numbers nearest to values of [-1, 1] into `codes` (uint8).

        A value in the middle of two becomes the smaller one.
        """
        if values.device.type != "cpu":
            codes.copy_(self._codes[torch.bucketize(values, self._bounds, out_int32=True)])
            return
        half = _PARTS // 2
        torch.index_select(self._table, 0, (values * half).add_(half).int(), out=codes)
        searched = torch.from_numpy(numpy.flatnonzero(codes.numpy() == _SEARCHED))  # faster than torch
        if len(searched):
            codes[searched] = self._codes[torch.bucketize(values[searched], self._bounds)]


def _table(bounds: Tensor, codes: Tensor) -> Tensor:
    """The code of each of many equal parts of [-1, 1], uint8, which is found faster than by a search.

    It is _SEARCHED in parts that hold one of the `bounds`, or whose end is so near to one that rounding could
    mistake the part of a value.
    """
    position = (bounds.double() + 1.0) * (_PARTS // 2)
    parts = torch.arange(_PARTS + 1, dtype=torch.float64)
    below = torch.searchsorted(position + _NEAR, parts)
    above = torch.searchsorted(position - _NEAR, parts + 1.0)
    return torch.where(below == above, codes[below], _SEARCHED).to(torch.uint8)


@cache
def _levels(kind: str, device: torch.device) -> _Levels:
    """Of NF4, FP4, or the magnitudes of double quantisation."""
    return _Levels((dynamic_map() if kind == "magnitudes" else CODE_BOOKS[kind]).to(device))


def _nearest(flat: Tensor, levels: _Levels, blocksize: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n], largest magnitude of each block float32) of a vector [n]."""
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // blocksize), device=flat.device)
    full = flat.numel() // blocksize * blocksize
    step = _blocks_at_once(blocksize, flat) * blocksize
    for start in range(0, full, step):
        stop = min(full, start + step)
        blocks = flat[start:stop].float().reshape(-1, blocksize)
        largest = torch.amax(blocks.abs(), 1, out=absmax[start // blocksize : stop // blocksize])
        factors = largest.clamp(min=_LEAST).reciprocal_()
        levels.find((blocks * factors[:, None]).reshape(-1), codes[start:stop])
    if full < flat.numel():  # bitsandbytes divides the values of a short block instead
        rest = flat[full:].float()
        absmax[-1] = rest.abs().max().clamp(min=_LEAST)
        levels.find(rest / absmax[-1], codes[full:])
    return codes, absmax


def _blocks_at_once(blocksize: int, tensor: Tensor) -> int:
    """Blocks that are processed at the same time; a GPU gets all of them."""
    return max(1, _AT_ONCE // blocksize if tensor.device.type == "cpu" else tensor.numel())


def pack(codes: Tensor) -> Tensor:
    """Two codes per byte, the first one in the upper four bits: uint8 [n] -> uint8 [(n + 1) / 2]."""
    if len(codes) % 2:
        return torch.cat([pack(codes[:-1]), codes[-1:] << 4])
    if sys.byteorder == "little" and codes.is_contiguous():  # one pair is one number
        pairs = codes.view(torch.int16)
        return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2]


@cache
def _pair_table(book: tuple[float, ...], device: torch.device) -> Tensor:
    """Byte -> the two float32 numbers of its codes, as one int64."""
    levels = torch.tensor(book)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    return pairs.view(torch.int64).reshape(-1).to(device)


def decode(packed: Tensor, absmax: Tensor, book: Tensor, blocksize: int, start: int, stop: int) -> Tensor:
    """The values number `start` to `stop` in float32.

    packed: uint8 [(n + 1) / 2]. absmax: float32 [ceil(n / blocksize)]. book: float32 [16], the number of each
    code. blocksize: even.
    """
    table = _pair_table(tuple(book.tolist()), packed.device)
    first = start // blocksize
    last = -(-stop // blocksize)
    values = torch.empty((last - first) * blocksize, device=packed.device)
    step = _blocks_at_once(blocksize, packed)
    for block in range(first, last, step):
        end = min(last, block + step)
        part = values[(block - first) * blocksize : (end - first) * blocksize]
        found = packed[block * blocksize // 2 : end * blocksize // 2].int()
        torch.index_select(table, 0, found, out=part.view(torch.int64)[: found.numel()])
        part.view(-1, blocksize).mul_(absmax[block:end, None])
    return values[start - first * blocksize : stop - first * blocksize]


@cache
def dynamic_map() -> Tensor:
    """The 256 sorted numbers in [-1, 1] of double quantisation, float32 (Dettmers, arXiv:1511.04561).

    With e = 0 ... 6: the middles of 2^e equal parts of [0.1, 1], times 10^(e - 6), with both signs; 0; and 1.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(levels))


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """(codes uint8 [n], largest magnitude of each block of 256 float32, their mean) of magnitudes [n]."""
    offset = absmax.mean()
    codes, nested_scales = _nearest(absmax - offset, _levels("magnitudes", absmax.device), NESTED_BLOCK)
    return codes, nested_scales, float(offset)


def undo_double(
    codes: Tensor, levels: Tensor, nested_scales: Tensor, offset: float, nested_blocksize: int = NESTED_BLOCK
) -> Tensor:
    """The magnitudes [n] in float32 that double quantisation stores as `codes` uint8 [n].

    levels: float32 [256], the number of each code. nested_scales: float32 [ceil(n / nested_blocksize)].
    """
    scales = nested_scales.repeat_interleave(nested_blocksize)[: codes.numel()]
    return (levels[codes.int()] * scales).add_(torch.tensor(offset, device=codes.device))


def state_fields(
    rule: Rule, shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0
) -> dict[str, Any]:
    """What bitsandbytes writes as JSON next to a weight."""
    fields: dict[str, Any] = {
        "quant_type": rule.kind,
        "blocksize": rule.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if rule.double:
        fields |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return fields


def encode_state(fields: Mapping[str, Any], length: int | None = None) -> Tensor:
    """The JSON's bytes, uint8, filled up to `length` with spaces, which JSON ignores.

    If they are longer than that, the offset is written with the nine digits that a float32 needs. Raises
    ValueError if they do not fit even then.
    """
    text = json.dumps(dict(fields))
    length = len(text) if length is None else length
    if len(text) > length and "nested_offset" in fields:
        text = json.dumps({**fields, "nested_offset": float(f"{fields['nested_offset']:.9g}")})
    if len(text) > length:
        raise ValueError(f"{text} has more than {length} characters")
    return torch.tensor(list(text.ljust(length).encode()), dtype=torch.uint8)


def stored_infos(name: str, shape: tuple[int, ...], rule: Rule, dtype: torch.dtype) -> list[TensorInfo]:
    """The tensors that a checkpoint holds instead of the weight `name`; their sizes depend on no value.

    The last one is the JSON of `state_fields`.
    """
    count = prod(shape)
    blocks = -(-count // rule.blocksize)
    infos = [
        TensorInfo(name, ((count + 1) // 2, 1), "U8"),
        TensorInfo(f"{name}.absmax", (blocks,), "U8" if rule.double else "F32"),
        TensorInfo(f"{name}.quant_map", (16,), "F32"),
    ]
    if rule.double:
        infos += [
            TensorInfo(f"{name}.nested_absmax", (-(-blocks // NESTED_BLOCK),), "F32"),
            TensorInfo(f"{name}.nested_quant_map", (256,), "F32"),
        ]
    text = json.dumps(state_fields(rule, shape, dtype))
    length = len(text) + (_OFFSET_LENGTH - len("0.0") if rule.double else 0)
    return [*infos, TensorInfo(f"{name}.quant_state.bitsandbytes__{rule.kind}", (length,), "U8")]
