"""The safetensors header: eight bytes of length, JSON, then the tensors' bytes.

Read by hand because a plan needs shapes and offsets without loading anything, and written by hand
because the writer lays a file out before its first byte is known. Format: the README of
github.com/huggingface/safetensors.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from svdconvert.checkpoint.tensors import ELEMENTS, TensorInfo
from svdconvert.errors import CheckpointError

_LENGTH = 8
_ALIGNMENT = 8  # bytes; as the safetensors library pads its own headers
_LONGEST = 100_000_000  # the limit of the safetensors library, against headers made to exhaust memory


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor and where its bytes lie in the file."""

    info: TensorInfo
    begin: int


def header_length(first: bytes, file: str, size: int) -> int:
    """Bytes of JSON that follow the first eight. Raises CheckpointError where they cannot be there."""
    if len(first) < _LENGTH:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes are too few for a safetensors header; fetch it again"
        )
    length = int.from_bytes(first[:_LENGTH], "little")
    if length > _LONGEST or _LENGTH + length > size:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: its header claims {length} bytes, the file has {size}; "
            "fetch it again"
        )
    return length


def parse_header(text: bytes, file: str, size: int) -> list[Extent]:
    """The tensors of a header, by offset. `size` is the whole file's, in bytes.

    Raises CheckpointError where the header is not JSON, describes a tensor wrongly, or where the
    tensors do not fill the file exactly.
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
                f"{file}: the header lies about the place of {extent.info.name}; fetch it again"
            )
        end += extent.info.nbytes
    if end != size:
        state = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{file} is {state}: {size} bytes instead of {end}; fetch it again")
    return extents


def _extent(name: str, row: Any, start: int, file: str) -> Extent:
    try:
        dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        whole = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: the header's entry for {name} is malformed; fetch the file again"
        ) from error
    if not isinstance(dtype, str) or dtype not in ELEMENTS:
        raise CheckpointError(
            f"{file}: {name} has the element type {dtype!r}, which safetensors does not define"
        )
    info = TensorInfo(name, shape, dtype)
    if not whole or info.nbytes != end - begin:
        raise CheckpointError(f"{file}: the header lies about the size of {name}; fetch the file again")
    return Extent(info, start + begin)


def build_header(infos: Iterable[TensorInfo]) -> tuple[bytes, Mapping[str, int]]:
    """The first bytes of a file that holds `infos` in this order, and each tensor's offset in it.

    The metadata is exactly {"format": "pt"}: with more keys the library's own files differ from
    run to run, and without it transformers refuses the file.
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
