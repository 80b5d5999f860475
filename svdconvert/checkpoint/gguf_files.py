"""Read the float tensors of a GGUF file; every number in its header is bounded before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from struct import calcsize, error, unpack
from typing import TYPE_CHECKING

from svdconvert.checkpoint.regular_file import OpenFiles, open_regular
from svdconvert.checkpoint.tensors import ELEMENTS, TensorInfo, read_whole, versions_of_files
from svdconvert.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ENDING = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_TYPES = {0: "F32", 1: "F16", 30: "BF16"}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ALIGNMENT = 32
_LONGEST_HEADER = 64 << 20  # bytes
_MOST = 1 << 20  # tensors, and entries of the metadata
_MOST_SIDES = 4


class GgufSource:
    """A TensorSource over one GGUF file with tensors in float32, float16 or bfloat16."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises CheckpointError if it is damaged, or for quantised tensors."""
        self._path = path
        self._open = OpenFiles()
        self.metadata, self._begins, self.infos = _read_header(path)

    def read(self, name: str) -> "Tensor":
        """The tensor in its stored dtype, in newly allocated memory."""
        return read_whole(self, name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`; see TensorSource."""
        first, end, _ = (section or slice(None)).indices(self.infos[name].nbytes)
        reused = memoryview(bytearray(min(size, end - first)) if buffer is None else b"")
        for start in range(first, end, size):
            stop = min(start + size, end)
            chunk = reused[: stop - start] if buffer is None else buffer[start - first : stop - first]
            self._open.fill(self._path, chunk, self._begins[name] + start, name)
            yield chunk

    def file_versions(self) -> Mapping[str, list[int]]:
        """Size and time of the last change of the file."""
        return versions_of_files([self._path])


def _read_header(path: Path) -> tuple[dict[str, object], dict[str, int], dict[str, TensorInfo]]:
    try:
        with open(open_regular(path), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            reader = _Reader(stream.read(_LONGEST_HEADER), size, path)
    except OSError as failure:
        raise CheckpointError(f"{path} cannot be read: {failure.strerror}; restore the file") from failure
    try:
        return reader.header()
    except (error, UnicodeDecodeError, ValueError, KeyError) as failure:
        raise CheckpointError(
            f"{path} is no GGUF file with float tensors, or is damaged ({failure}); fetch it again"
        ) from failure


class _Reader:
    """Takes the header apart; raises ValueError, KeyError or struct.error for what is not as it must be."""

    def __init__(self, data: bytes, size: int, path: Path) -> None:
        self._data = data
        self._size = size
        self._path = path
        self._at = 0

    def header(self) -> tuple[dict[str, object], dict[str, int], dict[str, TensorInfo]]:
        """(metadata without lists, tensor -> offset in the file, tensor -> its description)."""
        if self._take(4) != _MAGIC or self._number("I") not in _VERSIONS:
            raise ValueError("another magic number or version")
        tensors = self._count()
        entries = self._count()
        metadata = dict(self._entry() for _ in range(entries))
        rows = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError("an alignment out of range")
        start = -(-self._at // alignment) * alignment
        begins = {}
        for info, offset in rows:
            begins[info.name] = start + offset
            if begins[info.name] + info.nbytes > self._size:
                raise ValueError(f"{info.name} ends behind the end of the file")
        if len(begins) != len(rows):
            raise ValueError("a name stands twice")
        return metadata, begins, {info.name: info for info, _ in rows}

    def _entry(self) -> tuple[str, object]:
        return self._text(), self._value(self._number("I"), 0)

    def _value(self, kind: int, depth: int) -> object:
        if kind == _STRING:
            return self._text()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != 9 or depth:
            raise ValueError("a value of an unknown type")
        inner = self._number("I")
        for _ in range(self._count(_LONGEST_HEADER)):
            self._value(inner, depth + 1)
        return None

    def _tensor(self) -> tuple[TensorInfo, int]:
        name = self._text()
        sides = self._number("I")
        if not 0 <= sides <= _MOST_SIDES:
            raise ValueError(f"{name} has {sides} sides")
        shape = tuple(self._number("Q") for _ in range(sides))[::-1]
        kind = self._number("I")
        if kind not in _TYPES:
            raise ValueError(f"{name} is quantised (ggml type {kind})")
        offset = self._number("Q")
        if prod(max(1, side) for side in shape) * ELEMENTS[_TYPES[kind]][0] > 8 * self._size:
            raise ValueError(f"{name} is larger than the file")
        return TensorInfo(name, shape, _TYPES[kind]), offset

    def _count(self, most: int = _MOST) -> int:
        count = self._number("Q")
        if count > min(most, self._size):
            raise ValueError("a count out of range")
        return count

    def _number(self, code: str) -> int:
        (value,) = unpack(f"<{code}", self._take(calcsize(f"<{code}")))
        return value  # type: ignore[no-any-return]

    def _text(self) -> str:
        return self._take(self._count(_LONGEST_HEADER)).decode()

    def _take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) < count:
            raise ValueError("it is truncated")
        self._at += count
        return part
