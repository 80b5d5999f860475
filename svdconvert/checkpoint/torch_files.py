"""PyTorch's files (.bin, .pth): memory-mapped, and nothing but tensors is unpickled."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from svdconvert.checkpoint.safetensors_files import PICKLED_INDEX, refuse_misplaced
from svdconvert.checkpoint.tensors import TensorInfo, dtype_code, in_chunks, tensor_bytes, versions_of_files
from svdconvert.errors import CheckpointError

# Lightning puts "model." before every tensor name of an RWKV.
_WRAPPED = ("model.emb.", "model.blocks.", "model.ln_out.", "model.head.")


class PickledSource:
    """A TensorSource over PyTorch files, loaded with `weights_only` and `mmap`.

    Raises CheckpointError if a file is damaged, holds more than tensors, or lacks a tensor of `weight_map`
    (tensor -> file).
    """

    def __init__(self, files: list[Path], weight_map: Mapping[str, str] | None = None) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._files = files
        for file in files:
            self._tensors.update(_load(file))
        if weight_map is not None:
            refuse_misplaced(weight_map, self._tensors, files[0].parent / PICKLED_INDEX)
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tuple(tensor.shape), dtype_code(tensor.dtype))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """A copy of the mapped tensor: writing to the mapping would keep its pages in memory."""
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Size and time of the last change of every file."""
        return versions_of_files(self._files)

    def chunks(self, name: str, size: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`: views of the mapped file or of `buffer`."""
        return in_chunks(tensor_bytes(self._tensors[name]), size, buffer)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        with catch_warnings():
            simplefilter("ignore")  # torch warns that checking sparse tensors is slow; they are refused below
            loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and was not unpickled, because that can run code; "
            "save it as safetensors with the program that wrote it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged or in PyTorch's format from before 1.6; fetch it again or save it "
            "with a newer PyTorch"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(_is_dense(value) for value in loaded.values()):
        raise CheckpointError(
            f"{file} is not a state dict (a mapping from names to dense tensors); "
            "save the model's state_dict()"
        )
    if all(name.startswith(_WRAPPED) for name in loaded):
        return {name.removeprefix("model."): tensor for name, tensor in loaded.items()}
    return loaded


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
