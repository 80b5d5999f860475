"""Read a checkpoint on the Hub by HTTP range requests, without writing it to disk.

huggingface_hub's parse_safetensors_file_metadata is not used: it returns neither the length of the header
nor the size of the file, so that offsets in the file stay unknown and a truncated file is not noticed.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

from svdconvert.checkpoint.header import Extent, header_length, parse_header
from svdconvert.checkpoint.safetensors_files import INDEX, locate_tensors, refuse_misplaced
from svdconvert.checkpoint.tensors import TensorInfo, in_chunks, read_whole
from svdconvert.errors import CheckpointError, SvdConvertError
from svdconvert.hub.auth import endpoint, find_token
from svdconvert.hub.download import Snapshot, weight_files
from svdconvert.hub.errors import hub_errors_as, pause_before_retry
from svdconvert.hub.replies import WrongReplyError, check_commit, check_range, watch_session

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1 << 20  # bytes of the first request for a header, and of small tensors that are read together
_RUNS_KEPT = 4  # one thread reads matrices, another one copies other tensors
_CHUNK = 1 << 18
_PARALLEL = 8  # headers that are requested at the same time
_RETRIES = 6  # in succession, without receiving a byte
_RETRIES_IN_ALL = 60  # of one read
_LONGEST_WAIT = 8.0  # seconds
_TIMEOUT = 30.0  # seconds without a byte, after which a connection counts as broken
_SLOWEST = 4096  # bytes per second, below which a connection counts as broken


class Unstreamable(CheckpointError):
    """A repository without safetensors, whose weights can only be downloaded."""


class RemoteFile:
    """One file of a repository at a commit, read by range requests; several threads may use it."""

    def __init__(self, repository: str, commit: str, name: str, token: str | None = None) -> None:
        from huggingface_hub import hf_hub_url

        self.name = f"{repository}/{name}"
        self._repository = repository
        self._commit = commit
        self._token = token
        self._url = hf_hub_url(repository, name, revision=commit)
        self.size: int | None = None
        """Size in bytes; None before the first read."""

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`, or to the end of the file if that is earlier."""
        return b"".join(self.chunks(begin, end))

    def chunks(self, begin: int, end: int) -> Iterator[bytes]:
        """The same bytes as they arrive. If the connection breaks, the rest is requested again.

        Raises CheckpointError if it breaks again and again, if the Hub refuses the request, or if an answer
        is not the range that was asked for.
        """
        in_succession = 0
        failures = 0
        while begin < (end if self.size is None else min(end, self.size)):
            before = begin
            try:
                for chunk in self._ask(begin, end):
                    begin += len(chunk)
                    yield chunk
                pause: float | None = 0.0
            except SvdConvertError:
                raise
            except Exception as error:
                with hub_errors_as(CheckpointError, self._repository):
                    if (pause := pause_before_retry(error)) is None:
                        raise
            if begin >= min(end, self.size or end):
                return
            in_succession = 1 if begin > before else in_succession + 1
            failures += 1
            if in_succession > _RETRIES or failures > _RETRIES_IN_ALL:
                raise self._broken(begin)
            sleep(max(pause, min(_LONGEST_WAIT, 0.125 * 2**in_succession)))

    def _broken(self, begin: int) -> CheckpointError:
        return CheckpointError(
            f"{self.name} cannot be read: the connection to {endpoint()} breaks again and again at byte "
            f"{begin}; run the same command again to continue"
        )

    def _ask(self, begin: int, end: int) -> Iterator[bytes]:
        """The body of one request, at most the bytes that were asked for.

        Raises an error of huggingface_hub or httpx, or WrongReplyError.
        """
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, httpx

        headers = {
            **build_hf_headers(token=self._token),
            "Range": f"bytes={begin}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        # The caller repeats the request, because it knows what has arrived.
        options: dict[str, Any] = {"timeout": _TIMEOUT, "retry_on_exceptions": (), "max_retries": 0}
        watch_session()
        with http_stream_backoff("GET", self._url, headers=headers, **options) as response:
            hf_raise_for_status(response)
            check_commit(response, self.name, self._commit)
            self.size = check_range(response, self.name, begin, end, self.size)
            left = min(end, self.size) - begin
            limit = monotonic() + _TIMEOUT + left / _SLOWEST
            for chunk in response.iter_raw(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise WrongReplyError(
                        f"{endpoint()} sends more of {self.name} than was asked for; leave out --stream, or "
                        "check the proxy"
                    )
                yield chunk
                if left and monotonic() > limit:
                    raise httpx.ReadTimeout(f"{self.name} arrives too slowly")


class RemoteSource:
    """A TensorSource over safetensors files of the Hub at one commit."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Read the headers of a model whose sidecars are in `snapshot`.

        Raises Unstreamable if it has no safetensors, CheckpointError if one is damaged.
        """
        assert snapshot.revision is not None
        names, weight_map = weight_files(snapshot)
        token = find_token()
        self._files = {
            Path(name): RemoteFile(snapshot.location, snapshot.revision, name, token) for name in names
        }
        with _in_safetensors(snapshot), ThreadPoolExecutor(_PARALLEL, "headers") as pool:
            headers = zip(self._files, pool.map(_header, self._files.values()), strict=True)
            self._extents = locate_tensors(headers, weight_map)
        self.infos: Mapping[str, TensorInfo] = {
            name: extent.info for name, (_, extent) in self._extents.items()
        }
        if weight_map is not None:
            refuse_misplaced(weight_map, self.infos, snapshot.path / INDEX)
        self._runs = _small_runs(self._extents)
        self._cached: dict[_Run, bytes] = {}
        self._lock = Lock()

    def read(self, name: str) -> "Tensor":
        """The tensor in its stored dtype, in newly allocated memory."""
        return read_whole(self, name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`, from one request; see TensorSource."""
        end = 0
        for received in self._received(name, section or slice(None)):
            part = None if buffer is None else buffer[end : end + len(received)]
            yield from in_chunks(memoryview(received), size, part)
            end += len(received)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Size of every file; a commit never changes."""
        return {str(path): [file.size or 0] for path, file in self._files.items()}

    def _received(self, name: str, section: slice) -> Iterator[bytes]:
        path, extent = self._extents[name]
        first, last, _ = section.indices(extent.info.nbytes)
        begin = extent.begin + first
        end = extent.begin + last
        if name in self._runs:
            run = self._runs[name]
            yield self._run(run)[begin - run.begin : end - run.begin]
        else:
            yield from self._files[path].chunks(begin, end)

    def _run(self, run: "_Run") -> bytes:
        """The bytes of a run, from memory if it was read recently."""
        with self._lock:
            if run not in self._cached:
                if len(self._cached) == _RUNS_KEPT:
                    del self._cached[next(iter(self._cached))]
                self._cached[run] = self._files[run.path].read(run.begin, run.end)
            return self._cached[run]


class _Run(NamedTuple):
    """Adjacent small tensors of a file, which are read by one request."""

    path: Path
    begin: int
    end: int


def _small_runs(extents: Mapping[str, tuple[Path, Extent]]) -> dict[str, _Run]:
    """Small tensor -> its run; a request takes longer than the transfer of such a tensor."""
    runs: dict[str, _Run] = {}
    members: list[str] = []
    last = _Run(Path(), 0, 0)
    for name, (path, extent) in extents.items():
        end = extent.begin + extent.info.nbytes
        if extent.info.nbytes >= _SMALL:
            continue
        if (path, extent.begin) != (last.path, last.end) or end - last.begin > _SMALL:
            members = []
            last = _Run(path, extent.begin, extent.begin)
        members.append(name)
        last = last._replace(end=end)
        runs.update(dict.fromkeys(members, last))
    return runs


@contextmanager
def _in_safetensors(snapshot: Snapshot) -> Iterator[None]:
    """Raise Unstreamable if a file is missing because the repository has no safetensors."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        yield
    except CheckpointError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
        raise Unstreamable(
            f"{snapshot.location} has no safetensors, the only format that can be streamed; "
            "leave out --stream, or give a directory"
        ) from error


def _header(file: RemoteFile) -> list[Extent]:
    first = file.read(0, _SMALL)
    assert file.size is not None
    length = header_length(first[:8], file.name, file.size)
    text = first[8 : 8 + length]
    if len(text) < length:
        text += file.read(8 + len(text), 8 + length)
    return parse_header(text, file.name, file.size)
