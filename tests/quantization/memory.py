"""A checkpoint in memory, and its quantised weights as the formats see them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorInfo, dtype_code, in_chunks, tensor_bytes
from svdconvert.quantization.base import Coded, StorageFormat
from svdconvert.quantization.view import DecodedSource, detect_formats


class Memory:
    """A TensorSource of tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.infos = {
            name: TensorInfo(name, tuple(tensor.shape), dtype_code(tensor.dtype))
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        return in_chunks(tensor_bytes(self.tensors[name])[section or slice(None)], size, buffer)

    def file_versions(self) -> Mapping[str, list[int]]:
        return {}


def view(tensors: Mapping[str, Tensor], dtype: str = "F32", **settings: Any) -> DecodedSource:
    """The checkpoint with its quantised weights decoded."""
    source = Memory(tensors)
    return DecodedSource(source, detect_formats(source, settings), dtype)


def decode(tensors: Mapping[str, Tensor], name: str = "a.weight", **settings: Any) -> Tensor:
    """One weight in float32, decoded row by row and at once, which must agree."""
    shown = view(tensors, **settings)
    plugin, coded = shown.coded[name]
    parts = shown.parts(name)
    whole = plugin.decode(coded, parts, slice(0, coded.shape[0]))
    rows = [plugin.decode(coded, parts, slice(row, row + 1)) for row in range(coded.shape[0])]
    assert whole.dtype == torch.float32
    assert whole.shape == coded.shape
    assert torch.equal(torch.cat(rows), whole)
    return whole


def encode(tensors: Mapping[str, Tensor], weight: Tensor, **settings: Any) -> dict[str, Tensor]:
    """The stored tensors with `weight` in the place of the weight a.weight."""
    source = Memory(tensors)
    plugin, coded = only(source, **settings)
    parts = {part: source.read(stored) for part, stored in coded.parts.items()}
    made = plugin.encode(coded, weight.clone(), parts)
    for part, tensor in made.items():
        assert (tensor.shape, tensor.dtype) == (parts[part].shape, parts[part].dtype), part
    assert made.keys() == parts.keys()
    return {**tensors, **{coded.parts[part]: tensor for part, tensor in made.items()}}


def only(source: Memory, **settings: Any) -> tuple[StorageFormat, Coded]:
    """The only quantised weight of a checkpoint."""
    (found,) = detect_formats(source, settings).values()
    return found


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
