"""What a checkpoint is to the rest of the program: named tensors, known before any is read."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from svdconvert.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# safetensors' code of an element type -> (bits of an element, torch's name of it).
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

# What can be decomposed: the formats whose values are the weights themselves.
REAL = ("F64", "F32", "BF16", "F16")


Passing = Callable[[Iterable[memoryview]], Iterable[memoryview]]
"""Looks at the pieces of a tensor as they pass."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; `dtype` is a key of ELEMENTS."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the stored data."""
        return (prod(self.shape) * ELEMENTS[self.dtype][0] + 7) // 8


class TensorSource(Protocol):
    """Named tensors, described by headers and read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor in the order of the files; nothing is loaded."""
        ...

    def read(self, name: str) -> "Tensor":
        """The tensor in memory of its own."""
        ...

    def chunks(self, name: str, size: int, room: memoryview | None = None) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most `size`.

        They are put into `room`, which has the tensor's size, one after the other; without one, each is
        valid until the next is asked for.
        """
        ...

    def file_versions(self) -> Mapping[str, list[int]]:
        """What changes when a file of the source is changed."""
        ...


def versions_of_files(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size in bytes and time of the last change in nanoseconds, by file name; links are followed.

    Raises CheckpointError where a file is gone.
    """
    try:
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read: {error.strerror}; restore the file"
        ) from error


def torch_dtype(code: str) -> "torch.dtype":
    """torch's dtype of safetensors' code. Raises CheckpointError where torch has none."""
    import torch

    dtype = getattr(torch, ELEMENTS[code][1], None) if code in ELEMENTS else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"element type {code} has no counterpart in torch {torch.__version__}")
    return dtype


def dtype_code(dtype: "torch.dtype") -> str:
    """safetensors' code of torch's dtype."""
    name = str(dtype).removeprefix("torch.")
    if name not in _CODES:
        raise CheckpointError(f"torch dtype {name} cannot be stored in safetensors")
    return _CODES[name]


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """The tensor's own memory as bytes; copies only what is not contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def pieces(data: memoryview, size: int, room: memoryview | None = None) -> Iterator[memoryview]:
    """`data` cut into views of at most `size` bytes, of its own memory or copied into `room`."""
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        if room is not None:
            room[start : start + size] = piece
            piece = room[start : start + size]
        yield piece


def read_whole(
    source: TensorSource,
    name: str,
    room: "Tensor | None" = None,
    over: Passing = iter,
    size: int | None = None,
) -> "Tensor":
    """The tensor in its stored dtype, in pieces of `size` that pass `over`.

    In the memory of `room`, bytes enough for it, or in memory of its own.
    """
    import torch

    info = source.infos[name]
    raw = torch.empty(info.nbytes, dtype=torch.uint8) if room is None else room[: info.nbytes]
    deque(over(source.chunks(name, size or max(1, info.nbytes), raw.numpy().data)), maxlen=0)
    return raw.view(torch_dtype(info.dtype)).reshape(info.shape)


def blocks_of_rows(source: TensorSource, name: str, rows: int) -> Iterator["Tensor"]:
    """A matrix as stored, `rows` rows at a time; each is valid until the next is asked for."""
    import torch

    info = source.infos[name]
    room = torch.empty(rows * (info.nbytes // info.shape[0]), dtype=torch.uint8)
    view, filled = room.numpy().data, 0
    for piece in source.chunks(name, len(view)):
        while len(piece):
            count = min(len(piece), len(view) - filled)
            view[filled : filled + count] = piece[:count]
            piece, filled = piece[count:], filled + count
            if filled == len(view):
                yield room.view(torch_dtype(info.dtype)).reshape(-1, *info.shape[1:])
                filled = 0
    if filled:
        yield room[:filled].view(torch_dtype(info.dtype)).reshape(-1, *info.shape[1:])
