"""Read a GGUF file: its header at once, its tensors one at a time, as the bytes of their blocks.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read by our own
code, because the reader of the library `gguf` maps the file and trusts every number in it.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from struct import calcsize, unpack
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.regular_file import OpenFiles, open_regular
from svdconvert.checkpoint.tensors import TensorInfo, read_whole, versions_of_files
from svdconvert.errors import CheckpointError, MissingPackageError, brief

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")
"""By the number of a type; 8 is a text and 9 an array."""
_TEXT = 8
_ARRAY = 9
_DEEPEST = 4  # arrays in arrays
_DIMENSIONS = 4
_LONGEST_NAME = 1 << 16
_LONGEST_HEADER = 1 << 26  # bytes; the largest vocabularies take some 10 MB
_MOST_EXPERTS = 1 << 14
_CODE_OF_TYPE = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One matrix or vector, or one expert's matrix of a stack."""

    name: str
    """In the file, without the number of the expert."""
    shape: tuple[int, ...]
    """Of its values, as torch has it: the inner dimension last."""
    type: str
    """ggml's name of how the values are stored, such as Q4_K."""
    expert: int | None
    begin: int
    """Offset of the first byte in the file."""


class GgufFile:
    """A TensorSource over one GGUF file. Tensors of codes are shown as (rows, bytes of a row).

    Raises CheckpointError if the file is damaged, MissingPackageError without the library `gguf`.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        self._open = OpenFiles()
        self.metadata, found = _read_header(file)
        self.tensors: Mapping[str, GgufTensor] = {_stored_name(tensor): tensor for tensor in found}
        """By the names of `infos`; see `_stored_name`."""
        if len(self.tensors) < len(found):
            raise CheckpointError(f"{file} has two tensors of one name; fetch it again")
        self.infos: Mapping[str, TensorInfo] = {
            name: _info(name, tensor) for name, tensor in self.tensors.items()
        }

    def read(self, name: str) -> "Tensor":
        """The tensor, in newly allocated memory."""
        return read_whole(self, name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`; see TensorSource."""
        first, end, _ = (section or slice(None)).indices(self.infos[name].nbytes)
        total = end - first
        begin = self.tensors[name].begin + first
        reused = memoryview(bytearray(min(size, total)) if buffer is None else b"")
        for start in range(0, total, size):
            stop = min(start + size, total)
            chunk = reused[: stop - start] if buffer is None else buffer[start:stop]
            self._open.fill(self.path, chunk, begin + start, name)
            yield chunk

    def file_versions(self) -> Mapping[str, list[int]]:
        """Size and time of the last change of the file."""
        return versions_of_files([self.path])


def _stored_name(tensor: GgufTensor) -> str:
    """The name in the file; of codes, with their type, and of one of several experts, with its number."""
    kind = "" if tensor.type in _CODE_OF_TYPE else f".{tensor.type}"
    number = "" if tensor.expert is None else f".{tensor.expert}"
    return f"{tensor.name}{kind}{number}"


def _info(name: str, tensor: GgufTensor) -> TensorInfo:
    if tensor.type in _CODE_OF_TYPE:
        return TensorInfo(name, tensor.shape, _CODE_OF_TYPE[tensor.type])
    return TensorInfo(name, (*tensor.shape[:-1], _bytes_of_row(tensor.type, tensor.shape[-1])), "U8")


def _bytes_of_row(type_name: str, columns: int) -> int:
    values, nbytes = _block_sizes()[type_name]
    return columns // values * nbytes


def _block_sizes() -> dict[str, tuple[int, int]]:
    """ggml's type -> (values, bytes) of a block."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingPackageError(
            'GGUF files need the library gguf; install it with pip install "svdconvert[gguf]"'
        ) from error
    return {kind.name: sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _type_names() -> dict[int, str]:
    from gguf import GGMLQuantizationType

    return {int(kind): kind.name for kind in GGMLQuantizationType}


class _Header:
    """Reads the numbers and texts of a header, each of which must lie in the first 64 MiB."""

    def __init__(self, stream: BufferedReader, file: Path, size: int) -> None:
        self._stream = stream
        self._file = file
        self._left = min(size, _LONGEST_HEADER)

    @property
    def position(self) -> int:
        return self._stream.tell()

    def bytes(self, count: int) -> bytes:
        if count > self._left:
            raise self.damaged()
        self._left -= count
        data = self._stream.read(count)
        if len(data) != count:
            raise self.damaged()
        return data

    def number(self, code: str) -> Any:
        return unpack(code, self.bytes(calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.bytes(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged() from error

    def value_of(self, name: str, known: Mapping[str, Any]) -> Any:
        """The value of the entry `name`, which must not be among the `known` ones."""
        if name in known:
            raise self.refused(f"has two values of {brief(name)}")
        return self.value(self.number("<I"))

    def count(self, least: int) -> int:
        """A number of things of at least `least` bytes each."""
        found = int(self.number("<Q"))
        if found * least > self._left:
            raise self.damaged()
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of the metadata; for an array, only its length."""
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY and depth < _DEEPEST:
            inner = self.number("<I")
            scalar = _SCALARS[inner] if inner < len(_SCALARS) else ""
            count = self.count(calcsize(scalar) if scalar else 8)
            if scalar:
                self.bytes(count * calcsize(scalar))
            else:
                for _ in range(count):
                    self.bytes(self.number("<Q")) if inner == _TEXT else self.value(inner, depth + 1)
            return [count]
        if kind >= len(_SCALARS) or not _SCALARS[kind]:
            raise self.damaged()
        return self.number(_SCALARS[kind])

    def damaged(self) -> CheckpointError:
        return self.refused("is damaged, or no GGUF file of version 2 or 3")

    def refused(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._file} {reason}; fetch it again")


def _read_header(file: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """(scalars of the metadata by name, the tensors)."""
    try:
        with open(open_regular(file), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header = _Header(stream, file, size)
            if header.bytes(4) != _MAGIC or header.number("<I") not in _VERSIONS:
                raise header.damaged()
            tensors = header.count(24)
            entries = header.count(13)
            metadata: dict[str, Any] = {}
            for _ in range(entries):
                name = header.text()
                metadata[name] = header.value_of(name, metadata)
            found = [_read_tensor(header) for _ in range(tensors)]
            if len({name for name, *_ in found}) < len(found):
                raise header.refused("has two tensors of one name")
            alignment = metadata.get("general.alignment", 32)
            if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
                raise header.damaged()
            begin = -(-header.position // alignment) * alignment
            return metadata, [part for entry in found for part in _placed(header, *entry, begin, size)]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; restore the file") from error


def _read_tensor(header: _Header) -> tuple[str, tuple[int, ...], str, int]:
    """(name, shape, type, offset of the data)."""
    name = header.text()
    dimensions = header.number("<I")
    if not 1 <= dimensions <= _DIMENSIONS or len(name) > _LONGEST_NAME:
        raise header.damaged()
    shape = tuple(int(header.number("<Q")) for _ in range(dimensions))[::-1]
    sizes = _block_sizes()
    kind = _type_names().get(header.number("<I"), "")
    if kind not in sizes or 0 in shape or shape[-1] % sizes[kind][0]:
        raise header.damaged()
    return name, shape, kind, int(header.number("<Q"))


def _placed(  # noqa: PLR0913 (an entry of the header, and where the data is)
    header: _Header, name: str, shape: tuple[int, ...], kind: str, offset: int, begin: int, size: int
) -> list[GgufTensor]:
    """A tensor, or each matrix of a stack. Raises CheckpointError if it is not in the file."""
    per_row = _bytes_of_row(kind, shape[-1])
    nbytes = prod(shape[:-1]) * per_row
    if begin + offset + nbytes > size:
        raise header.damaged()
    if len(shape) == 3 and shape[0] > _MOST_EXPERTS:
        raise header.refused(f"has {brief(name)} for {shape[0]} experts, more than {_MOST_EXPERTS}")
    if len(shape) != 3:
        return [GgufTensor(name, shape, kind, None, begin + offset)]
    step = nbytes // shape[0] if shape[0] else 0
    return [
        GgufTensor(name, shape[1:], kind, expert, begin + offset + expert * step)
        for expert in range(shape[0])
    ]
