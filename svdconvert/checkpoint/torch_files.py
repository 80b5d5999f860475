"""PyTorch's files (.bin, .pth): only tensors are unpickled, and their values are read with pread."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from struct import unpack
from typing import IO, Any
from warnings import catch_warnings, simplefilter
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import Tensor

from svdconvert.checkpoint.regular_file import OpenFiles, open_regular
from svdconvert.checkpoint.safetensors_files import PICKLED_INDEX, refuse_misplaced
from svdconvert.checkpoint.tensors import (
    TensorInfo,
    dtype_code,
    in_chunks,
    read_whole,
    tensor_bytes,
    torch_dtype,
    versions_of_files,
)
from svdconvert.errors import CheckpointError

# Lightning puts "model." before every tensor name of an RWKV.
_WRAPPED = ("model.emb.", "model.blocks.", "model.ln_out.", "model.head.")
# What the words of torch's errors say if a pickle names a function or class that is not allowed.
_SIGNS_OF_CODE = ("unsupported global", "unsupported class", "unrecognized function", "not an allowed global")
# Allowed by `weights_only`, needed by no state dict, and able to allocate any size.
_ALLOCATING = (" bytearray", "torch Tensor", " Parameter")
# Of a zip entry's local header: its size, and the offset of the lengths of the name and of the extra field.
_LOCAL_HEADER = 30
_NAME_LENGTH = 26
# Flags of a zip entry that torch does not read: encrypted, a patch of another file, strongly encrypted.
_UNREADABLE = 1 | 1 << 5 | 1 << 6


@dataclass(frozen=True)
class _Extent:
    """The elements of a tensor in a file: as in torch, strides are counted in elements."""

    file: Path
    begin: int
    """Offset of the first element's first byte."""
    info: TensorInfo
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Number of bytes from the first element to the end of the last one."""
        if not self.info.nbytes:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.info.shape, self.strides, strict=True))
        return (last + 1) * torch_dtype(self.info.dtype).itemsize

    @property
    def is_contiguous(self) -> bool:
        """True if the bytes in the file are those of the tensor, in their order."""
        expected = 1
        for size, stride in zip(reversed(self.info.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class PickledSource:
    """A TensorSource over PyTorch files, whose pickles are loaded with `weights_only`.

    Raises CheckpointError if a file is damaged, holds more than tensors, or lacks a tensor of `weight_map`
    (tensor -> file).
    """

    def __init__(self, files: list[Path], weight_map: Mapping[str, str] | None = None) -> None:
        self._open = OpenFiles()
        self._files = files
        self._extents: dict[str, _Extent] = {}
        for file in files:
            self._extents.update(_load(file))
        if weight_map is not None:
            refuse_misplaced(weight_map, self._extents, files[0].parent / PICKLED_INDEX)
        self.infos: Mapping[str, TensorInfo] = {name: extent.info for name, extent in self._extents.items()}

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, contiguous, in newly allocated memory."""
        extent = self._extents[name]
        if extent.is_contiguous:
            return read_whole(self, name)
        raw = torch.empty(extent.span, dtype=torch.uint8)
        self._open.fill(extent.file, raw.numpy().data, extent.begin, name)
        return raw.view(torch_dtype(extent.info.dtype)).as_strided(extent.info.shape, extent.strides).clone()

    def file_versions(self) -> Mapping[str, list[int]]:
        """Size and time of the last change of every file."""
        return versions_of_files(self._files)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`; see TensorSource."""
        extent = self._extents[name]
        if not extent.is_contiguous:
            return in_chunks(tensor_bytes(self.read(name))[section or slice(None)], size, buffer)
        begin, end, _ = (section or slice(None)).indices(extent.info.nbytes)
        span = range(extent.begin + begin, extent.begin + end)
        return self._open.chunks(extent.file, span, name, size, buffer)


def _load(file: Path) -> dict[str, _Extent]:
    storages = _checked_archive(file)
    size = max(storages.values(), default=0)
    # On the device "meta" no values are read, and each storage knows where in the file they are.
    loaded = _unpickled(file, "meta")
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and _is_dense(value) for name, value in loaded.items()
    ):
        raise CheckpointError(
            f"{file} is not a state dict (a mapping from names to dense tensors); "
            "save the model's state_dict()"
        )
    if large := [name for name, tensor in loaded.items() if tensor.numel() * tensor.element_size() > size]:
        raise CheckpointError(
            f"{file}: {large[0]} is larger than the file; save its values, not a view of one"
        )
    prefix = "model." if all(name.startswith(_WRAPPED) for name in loaded) else ""
    return {
        name.removeprefix(prefix): _extent(file, name.removeprefix(prefix), tensor, storages)
        for name, tensor in loaded.items()
    }


def _extent(file: Path, name: str, tensor: Tensor, storages: Mapping[int, int]) -> _Extent:
    """A tensor's place in a file with `storages` (first byte -> end).

    Raises CheckpointError if the file does not hold its values.
    """
    first = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if first is None:
        raise CheckpointError(
            f"{file}: torch {torch.__version__} finds no values of {name}; save the model with them, or "
            "install a newer torch"
        )
    info = TensorInfo(name, tuple(tensor.shape), dtype_code(tensor.dtype))
    begin = first + tensor.storage_offset() * tensor.element_size()
    extent = _Extent(file, begin, info, tuple(tensor.stride()))
    if info.nbytes and begin + extent.span > storages.get(first, 0):
        raise CheckpointError(_is_damaged(file))
    return extent


def load_tensors_only(file: Path) -> Any:
    """What a file of torch.save holds; nothing but tensors and plain containers of them is unpickled.

    Raises CheckpointError if it is damaged, or holds anything else.
    """
    _checked_archive(file)
    return _unpickled(file, "cpu")


def _unpickled(file: Path, device: str) -> Any:
    try:
        with catch_warnings():
            simplefilter("ignore")  # torch warns that checking sparse tensors is slow; `_load` refuses them
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its instructions lead to
        if isinstance(error, UnpicklingError) and any(sign in str(error).lower() for sign in _SIGNS_OF_CODE):
            raise CheckpointError(_holds_more_than_tensors(file)) from error
        raise CheckpointError(_is_damaged(file)) from error


def _checked_archive(file: Path) -> dict[int, int]:
    """The first byte and the end of each entry of a .pth, after a look at its pickle without running it.

    Raises CheckpointError if it is not PyTorch's archive, if it is compressed or encrypted, or if its pickle
    calls what can take more memory than the file has bytes, which `weights_only` allows.
    """
    try:
        with open(open_regular(file), "rb") as stream, ZipFile(stream) as archive:
            size = os.fstat(stream.fileno()).st_size
            entries = archive.infolist()
            for entry in entries:
                is_stored = entry.compress_type == ZIP_STORED and not entry.flag_bits & _UNREADABLE
                if not is_stored or entry.file_size > size:
                    raise CheckpointError(_is_damaged(file))
            for entry in (entry for entry in entries if entry.filename.endswith("data.pkl")):
                for code, argument, _ in genops(archive.read(entry)):
                    if code.name == "GLOBAL" and str(argument).endswith(_ALLOCATING):
                        raise CheckpointError(_holds_more_than_tensors(file))
            return dict(_stored(entry, stream) for entry in entries)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and pickletools raise many kinds of errors for damaged files
        raise CheckpointError(_is_damaged(file)) from error


def _stored(entry: ZipInfo, stream: IO[bytes]) -> tuple[int, int]:
    """(offset of the first byte, offset of the end) of an entry that is not compressed."""
    stream.seek(entry.header_offset + _NAME_LENGTH)
    name, extra = unpack("<2H", stream.read(4))
    begin = entry.header_offset + _LOCAL_HEADER + name + extra
    return begin, begin + entry.file_size


def _holds_more_than_tensors(file: Path) -> str:
    return (
        f"{file} holds more than tensors and was not unpickled, because that can run code; "
        "save it as safetensors with the program that wrote it"
    )


def _is_damaged(file: Path) -> str:
    return (
        f"{file} is damaged or in PyTorch's format from before 1.6; fetch it again or save it "
        "with a newer PyTorch"
    )


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_nested or value.is_conj() or value.is_neg())
    )
