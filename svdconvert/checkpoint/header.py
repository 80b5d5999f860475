"""The header of a safetensors file: eight bytes with its length, then JSON, before the tensors' bytes.

The safetensors library is not used because a plan needs offsets without opening the file for loading, and
because the writer lays a file out before the values of its tensors are known. Format:
https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from svdconvert.checkpoint.tensors import ELEMENTS, TensorInfo
from svdconvert.errors import CheckpointError

_LENGTH = 8
_ALIGNMENT = 8  # bytes; as the safetensors library pads its own headers
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

    Raises CheckpointError if the header is not JSON, if it has inconsistent offsets, or if the tensors do not
    fill the file exactly.
    """
    try:
        table = json.loads(text)
        entries = {name: row for name, row in table.items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the safetensors header is not a JSON object; fetch it again"
        ) from error
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


def _extent(name: str, row: Any, start: int, file: str) -> Extent:
    try:
        dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        valid = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: the header's entry for {name} is malformed; fetch it again"
        ) from error
    if not isinstance(dtype, str) or dtype not in ELEMENTS:
        raise CheckpointError(
            f"{file}: {name} has the element type {dtype!r}, which safetensors does not define; "
            "fetch it again"
        )
    info = TensorInfo(name, shape, dtype)
    if not valid or info.nbytes != end - begin:
        raise CheckpointError(f"{file}: the header has inconsistent offsets for {name}; fetch it again")
    return Extent(info, start + begin)


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
