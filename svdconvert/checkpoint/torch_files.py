"""PyTorch's files (.bin, .pth): memory-mapped, and nothing but tensors is unpickled."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from typing import Any
from warnings import catch_warnings, simplefilter
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

from svdconvert.checkpoint.regular_file import open_regular
from svdconvert.checkpoint.safetensors_files import PICKLED_INDEX, refuse_misplaced
from svdconvert.checkpoint.tensors import TensorInfo, dtype_code, in_chunks, tensor_bytes, versions_of_files
from svdconvert.errors import CheckpointError

# Lightning puts "model." before every tensor name of an RWKV.
_WRAPPED = ("model.emb.", "model.blocks.", "model.ln_out.", "model.head.")
# What the words of torch's errors say if a pickle names a function or class that is not allowed.
_SIGNS_OF_CODE = ("unsupported global", "unsupported class", "unrecognized function", "not an allowed global")
# Allowed by `weights_only`, needed by no state dict, and able to allocate any size.
_ALLOCATING = (" bytearray", "torch Tensor", " Parameter")


class PickledSource:
    """A TensorSource over PyTorch files, loaded with `weights_only` and `mmap`.

    Raises CheckpointError if a file is damaged, holds more than tensors, or lacks a tensor of `weight_map`
    (tensor -> file).
    """

    def __init__(self, files: list[Path], weight_map: Mapping[str, str] | None = None) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._files = files
        self._sizes: dict[Path, int] = {}
        for file in files:
            self._tensors.update(_load(file))
            self._sizes[file] = file.stat().st_size
        if weight_map is not None:
            refuse_misplaced(weight_map, self._tensors, files[0].parent / PICKLED_INDEX)
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tuple(tensor.shape), dtype_code(tensor.dtype))
            for name, tensor in self._tensors.items()
        }

    def _refuse_truncated(self) -> None:
        """Raise CheckpointError if a file has become shorter: reading the mapping would end the process."""
        for file, size in self._sizes.items():
            if not file.is_file() or file.stat().st_size < size:
                raise CheckpointError(
                    f"{file} was truncated or removed while it was read; restore the file and run again"
                )

    def read(self, name: str) -> Tensor:
        """A copy of the mapped tensor: writing to the mapping would keep its pages in memory."""
        self._refuse_truncated()
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Size and time of the last change of every file."""
        return versions_of_files(self._files)

    def chunks(self, name: str, size: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`: views of the mapped file or of `buffer`."""
        self._refuse_truncated()
        for chunk in in_chunks(tensor_bytes(self._tensors[name]), size, buffer):
            yield chunk
            self._refuse_truncated()


def _load(file: Path) -> dict[str, Tensor]:
    loaded = load_tensors_only(file, mapped=True)
    size = file.stat().st_size
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
    if all(name.startswith(_WRAPPED) for name in loaded):
        return {name.removeprefix("model."): tensor for name, tensor in loaded.items()}
    return loaded


def load_tensors_only(file: Path, *, mapped: bool) -> Any:
    """What a file of torch.save holds; nothing but tensors and plain containers of them is unpickled.

    Raises CheckpointError if it is damaged, or holds anything else.
    """
    _check_archive(file)
    try:
        with catch_warnings():
            simplefilter("ignore")  # torch warns that checking sparse tensors is slow
            return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its instructions lead to
        if isinstance(error, UnpicklingError) and any(sign in str(error).lower() for sign in _SIGNS_OF_CODE):
            raise CheckpointError(_holds_more_than_tensors(file)) from error
        raise CheckpointError(_is_damaged(file)) from error


def _check_archive(file: Path) -> None:
    """Look at the pickle of a .pth without running it.

    Raises CheckpointError if it is not PyTorch's archive, if it is compressed, which a mapped file is not
    read as, or if its pickle calls what can take more memory than the file has bytes, which `weights_only`
    allows.
    """
    try:
        with open(open_regular(file), "rb") as stream, ZipFile(stream) as archive:
            size = os.fstat(stream.fileno()).st_size
            entries = archive.infolist()
            if any(entry.compress_type != ZIP_STORED or entry.file_size > size for entry in entries):
                raise CheckpointError(_is_damaged(file))
            for entry in (entry for entry in entries if entry.filename.endswith("data.pkl")):
                for code, argument, _ in genops(archive.read(entry)):
                    if code.name == "GLOBAL" and str(argument).endswith(_ALLOCATING):
                        raise CheckpointError(_holds_more_than_tensors(file))
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and pickletools raise many kinds of errors for damaged files
        raise CheckpointError(_is_damaged(file)) from error


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
        and value.device.type == "cpu"
        and not (value.is_nested or value.is_conj() or value.is_neg())
    )
