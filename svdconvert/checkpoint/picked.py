"""Tensors of several checkpoints as one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from svdconvert.checkpoint.tensors import TensorInfo, TensorSource

if TYPE_CHECKING:
    from torch import Tensor


class PickedSource:
    """Tensors of several sources under names of their own: a TensorSource for one new checkpoint."""

    def __init__(self, picked: Mapping[str, tuple[TensorSource, str]]) -> None:
        """`picked` maps every name to a source and the tensor's name there."""
        self._picked = picked
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, source.infos[own].shape, source.infos[own].dtype)
            for name, (source, own) in picked.items()
        }

    def origin(self, name: str) -> tuple[TensorSource, str]:
        """The source of a tensor, and its name there."""
        return self._picked[name]

    def read(self, name: str) -> "Tensor":
        """The tensor, in newly allocated memory."""
        source, own = self._picked[name]
        return source.read(own)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`."""
        source, own = self._picked[name]
        return source.chunks(own, size, buffer, section)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Those of all sources, numbered in the order of their first tensors."""
        sources: list[TensorSource] = []
        for source, _ in self._picked.values():
            if not any(source is known for known in sources):
                sources.append(source)
        return numbered_versions(sources)


def numbered_versions(sources: Sequence[TensorSource]) -> dict[str, list[int]]:
    """The versions of the files of several sources."""
    return {
        f"{number}/{file}": version
        for number, source in enumerate(sources, 1)
        for file, version in source.file_versions().items()
    }
