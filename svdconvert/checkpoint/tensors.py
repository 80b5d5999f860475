"""A checkpoint as named tensors, whose shapes and element types are known before any is read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from svdconvert.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# safetensors' code of an element type -> (bits per element, torch's name).
ELEMENTS: Mapping[str, tuple[int, str]] = {
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "C64": (64, "complex64"),
    "F32": (32, "float32"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "BF16": (16, "bfloat16"),
    "F16": (16, "float16"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "I8": (8, "int8"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
    "F6_E3M2": (6, ""),
    "F6_E2M3": (6, ""),
    "F4": (4, "float4_e2m1fn_x2"),
}
_CODES = {torch_name: code for code, (_, torch_name) in ELEMENTS.items() if torch_name}

# Element types that can be decomposed: their values are the weights themselves.
REAL = ("F64", "F32", "BF16", "F16")

OnChunk = Callable[[memoryview], None]
"""Called with every chunk of a tensor's bytes, in order; `Checksum.update` is one."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; `dtype` is a key of ELEMENTS."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the stored data in bytes."""
        return (prod(self.shape) * ELEMENTS[self.dtype][0] + 7) // 8


class TensorSource(Protocol):
    """Named tensors that are described by headers and read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order of the files; no data is loaded."""
        ...

    def read(self, name: str) -> "Tensor":
        """The tensor, in newly allocated memory."""
        ...

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in order, in chunks of at most `size` bytes; with a `section` only those.

        With a `buffer` of the same size, the chunks are views of it and fill it. Without one, a chunk
        is valid only until the next one is requested.
        """
        ...

    def file_versions(self) -> Mapping[str, list[int]]:
        """File name -> numbers that differ after the file has been changed."""
        ...


def versions_of_files(files: Iterable[Path]) -> dict[str, list[int]]:
    """File name -> [size in bytes, time of the last change in nanoseconds]; links are followed.

    Raises CheckpointError if a file no longer exists.
    """
    try:
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read: {error.strerror}; restore the file"
        ) from error


def torch_dtype(code: str) -> "torch.dtype":
    """torch's dtype for safetensors' code. Raises CheckpointError if this torch has none."""
    import torch

    dtype = getattr(torch, ELEMENTS[code][1], None) if code in ELEMENTS else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"element type {code} has no counterpart in torch {torch.__version__}; install a newer torch"
        )
    return dtype


def dtype_code(dtype: "torch.dtype") -> str:
    """safetensors' code for torch's dtype. Raises CheckpointError if it has none."""
    name = str(dtype).removeprefix("torch.")
    if name not in _CODES:
        raise CheckpointError(f"torch dtype {name} cannot be stored in safetensors; convert the tensor first")
    return _CODES[name]


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """The tensor's memory as bytes; only a tensor that is not contiguous is copied."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def same_bytes(one: "Tensor", other: "Tensor") -> bool:
    """True if two tensors have the same bytes in memory.

    By numpy: torch compares bfloat16 ten times as slowly, and memoryviews are compared byte by byte.
    """
    import numpy

    data, expected = (numpy.frombuffer(tensor_bytes(tensor), numpy.uint8) for tensor in (one, other))
    return numpy.array_equal(data, expected)


def in_chunks(data: memoryview, size: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
    """Views of `data` of at most `size` bytes each, or views of `buffer` after copying them into it."""
    for start in range(0, len(data), size):
        chunk = data[start : start + size]
        if buffer is not None:
            buffer[start : start + size] = chunk
            chunk = buffer[start : start + size]
        yield chunk


def read_whole(
    source: TensorSource,
    name: str,
    buffer: "Tensor | None" = None,
    on_chunk: OnChunk | None = None,
    size: int | None = None,
) -> "Tensor":
    """The tensor in its stored dtype, read in chunks of at most `size` bytes.

    `buffer` is a tensor of bytes whose memory the result uses; without it new memory is allocated. `on_chunk`
    is called with every chunk.
    """
    import torch

    info = source.infos[name]
    raw = torch.empty(info.nbytes, dtype=torch.uint8) if buffer is None else buffer[: info.nbytes]
    for chunk in source.chunks(name, size or max(1, info.nbytes), raw.numpy().data):
        if on_chunk is not None:
            on_chunk(chunk)
    return raw.view(torch_dtype(info.dtype)).reshape(info.shape)


def read_rows(source: TensorSource, name: str, rows: slice) -> "Tensor":
    """Some consecutive rows of a tensor in its stored dtype."""
    import torch

    info = source.infos[name]
    first, end, _ = rows.indices(info.shape[0])
    size = info.nbytes // max(1, info.shape[0])
    raw = torch.empty((end - first) * size, dtype=torch.uint8)
    for _ in source.chunks(name, max(1, len(raw)), raw.numpy().data, slice(first * size, end * size)):
        pass
    return raw.view(torch_dtype(info.dtype)).reshape(end - first, *info.shape[1:])


def blocks_of_rows(source: TensorSource, name: str, rows: int) -> Iterator["Tensor"]:
    """A matrix in its stored dtype, `rows` rows at a time.

    All blocks use the same memory: a block is valid only until the next one is requested.
    """
    import torch

    info = source.infos[name]
    buffer = torch.empty(rows * (info.nbytes // info.shape[0]), dtype=torch.uint8)
    view = buffer.numpy().data
    filled = 0
    for chunk in source.chunks(name, len(view)):
        while len(chunk):
            count = min(len(chunk), len(view) - filled)
            view[filled : filled + count] = chunk[:count]
            chunk = chunk[count:]
            filled += count
            if filled == len(view):
                yield buffer.view(torch_dtype(info.dtype)).reshape(-1, *info.shape[1:])
                filled = 0
    if filled:
        yield buffer[:filled].view(torch_dtype(info.dtype)).reshape(-1, *info.shape[1:])
