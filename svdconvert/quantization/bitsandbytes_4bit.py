"""bitsandbytes' 4-bit weights: NF4 and FP4, also with double quantisation."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor

from svdconvert.checkpoint.json_text import parse_json
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, tensor_bytes
from svdconvert.errors import CheckpointError
from svdconvert.quantization import nf4
from svdconvert.quantization.base import Coded, Parts, StorageFormat, require_shape

_STATE = ".quant_state.bitsandbytes__"
_LONGEST_STATE = 4096  # bytes of JSON
_LARGEST = 3.4e38  # of a float32
_NESTED = ("nested_absmax", "nested_quant_map")


class BitsAndBytes4Bit(StorageFormat):
    """Packed codes, the largest magnitudes of blocks, and a JSON text with the shape."""

    summary = "bitsandbytes 4-bit: NF4, FP4, double quantisation"
    methods = frozenset({"bitsandbytes"})
    encodes = True

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Every weight with a quant_state, whose text is read for the shape."""
        for name in source.infos:
            weight, found, kind = name.partition(_STATE)
            if found and weight in source.infos:
                yield _coded(source, weight, kind, name)

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """The numbers of the code book, times the magnitudes of their blocks."""
        width = prod(coded.shape[1:])
        absmax = parts["absmax"]
        if "nested_absmax" in parts:
            size, offset = _nested(_fields(parts["state"]), coded.parts["state"])
            absmax = nf4.undo_double(absmax, parts["nested_quant_map"], parts["nested_absmax"], offset, size)
        packed = parts["codes"].reshape(-1).view(torch.uint8)
        first = rows.start * width
        last = rows.stop * width
        blocksize = coded.settings["blocksize"]
        flat = nf4.decode(packed, absmax.float(), parts["quant_map"], blocksize, first, last)
        return flat.reshape(rows.stop - rows.start, *coded.shape[1:])

    def encode(self, coded: Coded, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """As bitsandbytes quantises; the text keeps its length, with the new mean of the magnitudes."""
        double = "nested_absmax" in parts
        rule = nf4.Rule(coded.settings["kind"], coded.settings["blocksize"], double)
        made = nf4.encode(weight, rule)
        packed = made.packed.view(parts["codes"].dtype).reshape(parts["codes"].shape)
        found = {**parts, "codes": packed, "absmax": made.scales}
        if made.nested_scales is not None:
            fields = {**_fields(parts["state"]), "nested_offset": made.offset}
            found["nested_absmax"] = made.nested_scales
            found["state"] = nf4.encode_state(fields, parts["state"].numel())
        return found

    def title(self, coded: Coded) -> str:
        """NF4 or FP4, and whether the magnitudes are quantised too."""
        double = " with double quantisation" if "nested_absmax" in coded.parts else ""
        return f"bitsandbytes {coded.settings['kind'].upper()}{double}"


def _coded(source: TensorSource, weight: str, kind: str, state: str) -> Coded:
    """Raises CheckpointError if the sizes of the stored tensors are not those that the text leads to."""
    infos = source.infos
    parts = {"codes": weight, "state": state}
    for part in ("absmax", "quant_map", *_NESTED):
        if f"{weight}.{part}" in infos:
            parts[part] = f"{weight}.{part}"
    if kind not in nf4.CODE_BOOKS or not {"absmax", "quant_map"} <= parts.keys():
        raise CheckpointError(
            f"{weight} lacks its absmax or quant_map, or is of the unknown type {kind!r}; fetch the "
            "checkpoint again"
        )
    if infos[state].nbytes > _LONGEST_STATE:
        raise CheckpointError(
            f"{state} has {infos[state].nbytes} bytes, too many; fetch the checkpoint again"
        )
    fields = _fields(source.read(state))
    shape = _shape(fields, infos[weight], state)
    blocksize = fields.get("blocksize")
    if type(blocksize) is not int or blocksize not in nf4.BLOCK_SIZES or fields.get("quant_type") != kind:
        raise CheckpointError(f"{state} holds no type and size of blocks that are known; restore the file")
    blocks = -(-prod(shape) // blocksize)
    _require(infos[parts["absmax"]], (blocks,), "U8" if "nested_absmax" in parts else "F32")
    _require(infos[parts["quant_map"]], (16,), "F32")
    settings = {"kind": kind, "blocksize": blocksize}
    if "nested_absmax" in parts:
        size, _ = _nested(fields, state)
        _require(infos[f"{weight}.nested_quant_map"], (256,), "F32")
        _require(infos[parts["nested_absmax"]], (-(-blocks // size),), "F32")
    return Coded(weight, shape, parts, 4, settings=settings)


def _fields(state: Tensor) -> dict[str, Any]:
    try:
        fields = parse_json(bytes(tensor_bytes(state)))
    except ValueError:
        fields = None
    return fields if isinstance(fields, dict) else {}


def _shape(fields: Mapping[str, Any], codes: TensorInfo, state: str) -> tuple[int, ...]:
    """The shape in the text. Raises CheckpointError if the codes do not have that many values."""
    shape = fields.get("shape")
    sizes = (
        shape if isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) else []
    )
    if not 1 <= len(sizes) <= 8 or (prod(sizes) + 1) // 2 != codes.nbytes:
        raise CheckpointError(
            f"{state} does not have the shape of {codes.name}, which has {codes.nbytes} bytes; fetch the "
            "checkpoint again"
        )
    return tuple(sizes)


def _nested(fields: Mapping[str, Any], state: str) -> tuple[int, float]:
    """(size of a block of magnitudes, their mean) of double quantisation."""
    size = fields.get("nested_blocksize")
    offset = fields.get("nested_offset")
    if type(size) is not int or not 1 <= size <= 1 << 20 or not _is_float32(offset):
        raise CheckpointError(
            f"{state} lacks the block size or the offset of its magnitudes; restore the file"
        )
    return size, float(offset)


def _is_float32(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and -_LARGEST < value < _LARGEST


def _require(info: TensorInfo, shape: tuple[int, ...], dtype: str) -> None:
    require_shape(info, shape)
    if info.dtype != dtype:
        raise CheckpointError(f"{info.name} is stored as {info.dtype} instead of {dtype}; fetch it again")


FORMAT = BitsAndBytes4Bit()
