"""The header of a safetensors file: eight bytes with its length, then JSON, before the tensors' bytes.

The safetensors library is not used because a plan needs offsets without opening the file for loading, and
because the writer lays a file out before the values of its tensors are known. Format:
https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isinf
from typing import Any

from svdconvert.checkpoint.json_text import depth, refuse_half_characters
from svdconvert.checkpoint.tensors import ELEMENTS, TensorInfo
from svdconvert.errors import CheckpointError

_LENGTH = 8
_ALIGNMENT = 8  # bytes; as the safetensors library pads its own headers
_LIMIT = 1 << 64  # above the numbers that the library holds
_DEEPEST = 127  # levels of the table, so that the library's JSON reader takes it
_LONGEST = 100_000_000  # bytes; the safetensors library's limit, against headers made to exhaust memory


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor and the offset of its first byte in the file."""

    info: TensorInfo
    begin: int


def header_length(first: bytes, file: str, size: int) -> int:
    """Length of the JSON, in bytes, from the `first` eight bytes of a file of `size` bytes.

    Raises CheckpointError if the file is too short for it.
    """
    if len(first) < _LENGTH:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes are too few for a safetensors header; fetch it again"
        )
    length = int.from_bytes(first[:_LENGTH], "little")
    if length > _LONGEST or _LENGTH + length > size:
        raise CheckpointError(
            f"{file} is not a complete safetensors file: its header claims {length} bytes and the file "
            f"has {size}; fetch it again"
        )
    return length


def parse_header(text: bytes, file: str, size: int) -> list[Extent]:
    """The tensors of a header, ordered by offset. `size` is that of the file, in bytes.

    Everything is refused that the safetensors library refuses, and what its description of the format
    forbids: bytes before the first brace, and keys that stand twice. Raises CheckpointError for that, for
    inconsistent offsets, and if the tensors do not fill the file exactly.
    """
    entries = _entries(text, file)
    start = _LENGTH + len(text)
    extents = [_extent(name, row, start, file) for name, row in entries.items()]
    extents.sort(key=lambda extent: (extent.begin, extent.info.nbytes))
    end = start
    for extent in extents:
        if extent.begin != end:
            raise CheckpointError(
                f"{file}: the header has inconsistent offsets for {extent.info.name}; fetch it again"
            )
        end += extent.info.nbytes
    if end != size:
        state = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{file} is {state}: {size} bytes instead of {end}; fetch it again")
    return extents


def _entries(text: bytes, file: str) -> dict[str, Any]:
    """Tensor name -> its row in a header, not checked yet."""
    try:
        if not text.startswith(b"{"):
            raise ValueError("no object")
        table = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_int=_parse_number,
            parse_float=_parse_number,
            parse_constant=_refuse_constant,
        )
        metadata = table.pop("__metadata__", None)
        if not isinstance(metadata, dict | None) or any(
            type(value) is not str for value in (metadata or {}).values()
        ):
            raise ValueError("metadata that are no strings")
        if b"\\u" in text:
            refuse_half_characters([table, metadata])
        if depth(table) > _DEEPEST:
            raise ValueError("too deep")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the safetensors header is not a JSON object as the format has it; fetch it again"
        ) from error
    assert isinstance(table, dict)
    return table


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key stands twice")
    return table


def _parse_number(text: str) -> int | float:
    """An integer of 64 bits as int, any other number as float, as the library's JSON reader does."""
    if text.lstrip("-").isdigit() and len(text) <= 20 and text != "-0":
        value = int(text)
        if -(1 << 63) <= value < _LIMIT:
            return value
    if isinf(number := float(text)):
        raise ValueError("a number is out of range")
    return number


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _extent(name: str, row: Any, start: int, file: str) -> Extent:
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("shape"), list)
        or not _is_pair(row.get("data_offsets"))
    ):
        raise CheckpointError(f"{file}: the header's entry for {name} is malformed; fetch it again")
    dtype = row.get("dtype")
    if not isinstance(dtype, str) or dtype not in ELEMENTS:
        raise CheckpointError(
            f"{file}: {name} has the element type {dtype!r}, which safetensors does not define; "
            "fetch it again"
        )
    begin, end = row["data_offsets"]
    nbytes = _checked_size(row["shape"], dtype)
    if nbytes is None or any(not _is_size(value) for value in (begin, end)) or nbytes != end - begin:
        raise CheckpointError(f"{file}: the header has inconsistent offsets for {name}; fetch it again")
    return Extent(TensorInfo(name, tuple(row["shape"]), dtype), start + begin)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2  # noqa: PLR2004 (begin and end)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _checked_size(shape: list[Any], dtype: str) -> int | None:
    """Bytes of a tensor; None if a side is no size, if 64 bits overflow, or if the last byte is not full."""
    bits = 1
    for side in (*shape, ELEMENTS[dtype][0]):
        if not _is_size(side) or (bits := bits * side) >= _LIMIT:
            return None
    return None if bits % 8 else bits // 8


def build_header(infos: Iterable[TensorInfo]) -> tuple[bytes, Mapping[str, int]]:
    """The first bytes of a file that holds `infos` in this order, and the offset of each tensor in the file.

    The metadata is exactly {"format": "pt"}: transformers refuses a file without it, and the safetensors
    library writes several keys in an order that differs from run to run.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for info in infos:
        offsets[info.name] = end
        table[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [end, end := end + info.nbytes],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(_LENGTH, "little") + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}
