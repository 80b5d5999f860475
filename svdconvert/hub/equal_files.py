"""Two models of the Hub that share files: what is the same in both need not be downloaded."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.checkpoint.safetensors_files import SafetensorsSource
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, read_whole
from svdconvert.hub.download import Snapshot, fetch, hashes_of_files
from svdconvert.hub.remote_source import RemoteSource, Unstreamable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SharedWeights:
    """The weights of two models, with the tensors that are known to be equal."""

    sources: tuple[TensorSource, TensorSource]
    equal: frozenset[str]


def shared_weights(first: Snapshot, second: Snapshot, *, stream: bool) -> SharedWeights | None:
    """The weights of two models whose sidecars are in the snapshots; None if they share no file.

    Files with the same SHA-256 in the Hub's LFS are neither downloaded nor read, except for their headers.
    With `stream` nothing is downloaded. Raises CheckpointError if a file is damaged or the Hub does not
    answer.
    """
    if first.revision is None or second.revision is None:
        return None
    hashes = hashes_of_files(first), hashes_of_files(second)
    common = {*hashes[0].values()} & {*hashes[1].values()}
    if not common:
        return None
    try:
        remote = RemoteSource(first), RemoteSource(second)
    except Unstreamable:
        return None
    equal = frozenset(
        name
        for name in remote[0].infos
        if name in remote[1].infos
        and hashes[0].get(remote[0].file_of(name), "") == hashes[1].get(remote[1].file_of(name))
    )
    if not equal:
        return None
    if stream:
        return SharedWeights(remote, equal)
    parts = [
        DownloadedPart(
            source, fetch(snapshot.name, without=_files(source, equal)).path, _files(source, equal)
        )
        for source, snapshot in zip(remote, (first, second), strict=True)
    ]
    return SharedWeights((parts[0], parts[1]), equal)


def _files(source: RemoteSource, equal: Collection[str]) -> frozenset[str]:
    """The files all of whose tensors are equal."""
    others = {source.file_of(name) for name in source.infos if name not in equal}
    return frozenset(source.file_of(name) for name in equal) - others


@dataclass(frozen=True)
class DownloadedPart:
    """A TensorSource of which some files were not downloaded; their tensors are read from the Hub."""

    remote: RemoteSource
    directory: Path
    absent: frozenset[str]

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, also of the files that were not downloaded."""
        return self.remote.infos

    @cached_property
    def _local(self) -> SafetensorsSource:
        files = {self.remote.file_of(name) for name in self.remote.infos} - self.absent
        return SafetensorsSource([self.directory / file for file in sorted(files)])

    def read(self, name: str) -> "Tensor":
        """The tensor in its stored dtype, in newly allocated memory."""
        return read_whole(self, name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes; see TensorSource."""
        source = self.remote if self.remote.file_of(name) in self.absent else self._local
        return source.chunks(name, size, buffer, section)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Size of every file; a commit never changes."""
        return self.remote.file_versions()
