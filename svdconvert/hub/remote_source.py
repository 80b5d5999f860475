"""A checkpoint that stays on the Hub: headers and tensors by HTTP range, nothing on disk."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from time import sleep
from typing import TYPE_CHECKING, Any, NamedTuple

from svdconvert.checkpoint.header import Extent, header_length, parse_header
from svdconvert.checkpoint.safetensors_files import INDEX, locate_tensors, refuse_misplaced
from svdconvert.checkpoint.tensors import TensorInfo, in_chunks, read_whole
from svdconvert.errors import CheckpointError
from svdconvert.hub.auth import endpoint, hub_errors_as, is_passing
from svdconvert.hub.download import Snapshot, weight_files

if TYPE_CHECKING:
    from torch import Tensor

_AHEAD = 1 << 20  # bytes of a header's first request, and of small tensors that are read together
_RUNS_KEPT = 4  # one thread reads matrices ahead of another one that copies
_CHUNK = 1 << 18
_AT_ONCE = 8  # headers that are asked for together
_RETRIES = 6  # in a row, without a byte in between
_LONGEST_WAIT = 8.0  # seconds
_SILENCE = 30.0  # seconds, after which a connection counts as broken


class Unstreamable(CheckpointError):
    """A repository whose weights cannot be read in ranges."""


class RemoteFile:
    """One file of a repository at a commit, read in ranges. Safe to be read by several threads."""

    def __init__(self, repository: str, commit: str, name: str) -> None:
        from huggingface_hub import hf_hub_url

        self.name, self._repository = f"{repository}/{name}", repository
        self._url = hf_hub_url(repository, name, revision=commit)
        self.size: int | None = None
        """In bytes; known after the first read."""

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`, or to the file's own end."""
        return b"".join(self.chunks(begin, end))

    def chunks(self, begin: int, end: int) -> Iterator[bytes]:
        """The same as they arrive; a connection that breaks is made anew from where it broke.

        Raises CheckpointError where it breaks again and again, or the Hub refuses.
        """
        failures = 0
        while begin < (end if self.size is None else min(end, self.size)):
            try:
                with hub_errors_as(self._repository, kind=CheckpointError):
                    for chunk in self._ask(begin, end):
                        begin += len(chunk)
                        failures = 0
                        yield chunk
            except CheckpointError as error:
                if not is_passing(error.__cause__):
                    raise
                failures += 1
                if failures > _RETRIES:
                    raise CheckpointError(
                        f"{self.name} cannot be read: the connection to {endpoint()} breaks again and again "
                        f"at byte {begin}; run the same command again to go on"
                    ) from error
                sleep(min(_LONGEST_WAIT, 0.25 * 2**failures))

    def _ask(self, begin: int, end: int) -> Iterator[bytes]:
        """One request. What is busy (429, 5xx) is asked again, and waited for as it says."""
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        # What breaks on the way is dealt with by the caller, who knows what has arrived.
        options: dict[str, Any] = {"headers": headers, "timeout": _SILENCE, "retry_on_exceptions": ()}
        with http_stream_backoff("GET", self._url, **options) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise CheckpointError(f"{endpoint()} does not send {self.name} in ranges; leave out --stream")
            self.size = int(response.headers["Content-Range"].rpartition("/")[2])
            yield from response.iter_raw(_CHUNK)


class RemoteSource:
    """A TensorSource over safetensors files of the Hub at one commit."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Read the headers of a model whose sidecars are in `snapshot`.

        Raises CheckpointError where it has no safetensors, or one is damaged.
        """
        assert snapshot.revision is not None
        names, weight_map = weight_files(snapshot)
        self._files = {Path(name): RemoteFile(snapshot.location, snapshot.revision, name) for name in names}
        with _in_safetensors(snapshot), ThreadPoolExecutor(_AT_ONCE, "headers") as pool:
            headers = zip(self._files, pool.map(_header, self._files.values()), strict=True)
            self._extents = locate_tensors(headers, weight_map)
        self.infos: Mapping[str, TensorInfo] = {
            name: extent.info for name, (_, extent) in self._extents.items()
        }
        if weight_map is not None:
            refuse_misplaced(weight_map, self.infos, snapshot.path / INDEX)
        self._runs = _small_runs(self._extents)
        self._near: dict[_Run, bytes] = {}
        self._lock = Lock()

    def read(self, name: str) -> "Tensor":
        """The whole tensor in its stored dtype, freshly allocated."""
        return read_whole(self, name)

    def chunks(self, name: str, size: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`, from one request; see TensorSource."""
        end = 0
        for received in self._received(name):
            part = None if buffer is None else buffer[end : end + len(received)]
            yield from in_chunks(memoryview(received), size, part)
            end += len(received)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Size of every file: a commit does not change."""
        return {str(path): [file.size or 0] for path, file in self._files.items()}

    def _received(self, name: str) -> Iterator[bytes]:
        path, extent = self._extents[name]
        begin, end = extent.begin, extent.begin + extent.info.nbytes
        if name in self._runs:
            run = self._runs[name]
            yield self._run(run)[begin - run.begin : end - run.begin]
        else:
            yield from self._files[path].chunks(begin, end)

    def _run(self, run: "_Run") -> bytes:
        """The bytes of a run, from memory where it was read with a neighbour."""
        with self._lock:
            if run not in self._near:
                if len(self._near) == _RUNS_KEPT:
                    del self._near[next(iter(self._near))]
                self._near[run] = self._files[run.path].read(run.begin, run.end)
            return self._near[run]


class _Run(NamedTuple):
    """Small tensors side by side, which are read together."""

    path: Path
    begin: int
    end: int


def _small_runs(extents: Mapping[str, tuple[Path, Extent]]) -> dict[str, _Run]:
    """Tensor -> its run, for all that are small: a request takes as long as many of them."""
    runs: dict[str, _Run] = {}
    members: list[str] = []
    last = _Run(Path(), 0, 0)
    for name, (path, extent) in extents.items():
        end = extent.begin + extent.info.nbytes
        if extent.info.nbytes >= _AHEAD:
            continue
        if (path, extent.begin) != (last.path, last.end) or end - last.begin > _AHEAD:
            members, last = [], _Run(path, extent.begin, extent.begin)
        members.append(name)
        last = last._replace(end=end)
        runs.update(dict.fromkeys(members, last))
    return runs


@contextmanager
def _in_safetensors(snapshot: Snapshot) -> Iterator[None]:
    """Say of a repository without safetensors that it is one."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        yield
    except CheckpointError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        raise Unstreamable(
            f"{snapshot.location} has no safetensors, and nothing else can be read without downloading it; "
            "leave out --stream, or give a directory"
        ) from error


def _header(file: RemoteFile) -> list[Extent]:
    first = file.read(0, _AHEAD)
    assert file.size is not None
    length = header_length(first[:8], file.name, file.size)
    text = first[8 : 8 + length]
    if len(text) < length:
        text += file.read(8 + len(text), 8 + length)
    return parse_header(text, file.name, file.size)
