"""One tensor after the other from a source into a staged output: the whole scheduler.

Reading, computing and writing go on at once, each in threads of its own: torch and the operating
system let go of the interpreter meanwhile. Memory is a matrix being read,
those in work and one being written, in rooms that are used again and again.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorSource, read_whole
from svdconvert.config.execution import Run
from svdconvert.config.progress import Progress
from svdconvert.errors import ArtifactError, CheckpointError
from svdconvert.linalg.threads import worker_pool
from svdconvert.manifest.fingerprint import CHUNK, Checksum
from svdconvert.output.staging import StagedOutput

Place = tuple[str, str]
"""(file, name) of an output tensor."""

_UNSYNCED = 256 << 20  # bytes of a file that may wait for the disk
_COPIES = 4  # untouched tensors that may wait for the writer, while matrices are read and computed
_WINDOW = 4  # shards per rank that are shared out together, so that finished shards come early


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What became of one matrix."""

    tensors: Mapping[Place, Tensor]
    note: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest."""


@dataclass(frozen=True, kw_only=True)
class TensorJob:
    """What is to be done with each tensor of a source."""

    order: Sequence[str]
    """Names, in the order of the output's shards."""
    matrices: Mapping[str, Any]
    """The names that are computed; all others are copied."""
    compute: Callable[[str, Tensor], TensorResult]
    """(name, tensor as stored) -> outcome. The tensor may be worked on in place, and be the outcome."""
    copies: Mapping[str, str]
    """Name -> file of the output; what has none is only noted."""
    parallelism: int = 1
    """Matrices that may be computed at once."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """Checksums that the source must have."""
    origin: str = ""
    """What to call the source in a complaint."""


Ahead = Callable[[str], tuple[Tensor, str]]
Compute = Callable[[str, Tensor], Future[TensorResult]]


def stream(work: TensorJob, source: TensorSource, staged: StagedOutput, run: Run) -> None:
    """Do this rank's share of the work, from where an earlier run left it.

    What is noted about each tensor ends in `staged.finished`, of all ranks. Raises CheckpointError where
    the source changed under the run, ArtifactError where a tensor is not the expected one.
    """
    file_versions = source.file_versions()
    mine = _share(work, source, staged.ranks.count)[staged.ranks.index]
    left = [name for name in mine if name not in staged.finished]
    if len(left) < len(mine):
        run.notify(f"going on from {staged.path}: {len(mine) - len(left)} of {len(mine)} tensors are done")
    sizes = {name: source.infos[name].nbytes for name in mine}
    done = sum(sizes.values()) - sum(sizes[name] for name in left)
    total = sum(sizes.values())
    rooms = BufferPool(work, source, left)
    with (
        _writing(work, source, staged, left, rooms) as behind,
        _reading(work, source, left, rooms) as ahead,
        _computing(work) as compute,
    ):
        for name in _finishing(work, left, ahead, compute, behind):
            done += sizes[name]
            run.track(Progress(name, work.copies.get(name, ""), done, total))
    if source.file_versions() != file_versions:
        raise CheckpointError(f"{work.origin} was changed while it was read; restore it and use --overwrite")
    staged.gather()


def _finishing(
    work: TensorJob, names: Iterable[str], ahead: Ahead, compute: Compute, behind: "BackgroundWriter"
) -> Iterator[str]:
    """Yield every name when its outcome, or its copy, is handed to the writer."""
    computing: dict[Future[TensorResult], tuple[str, str]] = {}

    def hand_over(most: int) -> Iterator[str]:
        while len(computing) > most:
            for future in wait(computing, return_when=FIRST_COMPLETED).done:
                name, mark = computing.pop(future)
                behind.matrix(name, mark, future.result())
                del future  # and the outcome with it, as soon as it is written
                yield name

    for name in names:
        if name in work.matrices:
            tensor, mark = ahead(name)
            computing[compute(name, tensor)] = (name, mark)
            del tensor
            yield from hand_over(work.parallelism - 1)
        else:
            behind.copy(name)
            yield name
    yield from hand_over(0)


def _share(work: TensorJob, source: TensorSource, ranks: int) -> list[list[str]]:
    """Each rank's names: largest first to the least loaded, within a window of shards; else in order."""
    if ranks == 1:
        return [list(work.order)]
    files = list(dict.fromkeys(work.copies.get(name, "") for name in work.order))
    window = {file: place // (_WINDOW * ranks) for place, file in enumerate(files)}
    groups: dict[int, list[str]] = {}
    for name in work.order:
        groups.setdefault(window[work.copies.get(name, "")], []).append(name)
    shares: list[list[str]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for names in groups.values():
        place = {name: at for at, name in enumerate(names)}
        chosen: list[list[str]] = [[] for _ in range(ranks)]
        for name in sorted(names, key=lambda name: -_cost(work, source, name)):
            rank = load.index(min(load))
            load[rank] += _cost(work, source, name)
            chosen[rank].append(name)
        for rank in range(ranks):
            shares[rank] += sorted(chosen[rank], key=place.__getitem__)
    return shares


def _cost(work: TensorJob, source: TensorSource, name: str) -> float:
    """Bytes; a matrix is computed, which takes many times as long as copying it."""
    return source.infos[name].nbytes * (10.0 if name in work.matrices else 1.0)


@contextmanager
def _reading(
    work: TensorJob, source: TensorSource, names: Iterable[str], rooms: "BufferPool"
) -> Iterator[Ahead]:
    """Yield a function that returns (matrix, checksum) and has the next one read meanwhile."""
    matrices = deque(name for name in names if name in work.matrices)
    waiting: deque[Future[tuple[Tensor, str]]] = deque()

    def read(name: str, room: Tensor) -> tuple[Tensor, str]:
        passing = Checksum()
        tensor = read_whole(source, name, room, passing.update, CHUNK)
        return tensor, _expected(work, name, passing.text())

    with ThreadPoolExecutor(1, "read") as pool:

        def begin() -> None:
            name = matrices.popleft()
            waiting.append(pool.submit(read, name, rooms.take(name)))

        def take(name: str) -> tuple[Tensor, str]:
            found = waiting.popleft().result()
            if matrices:
                begin()
            return found

        if matrices:
            begin()
        yield take


class BufferPool:
    """Memory for matrices, each the size of the largest: taken to read one, given back when it is written.

    One more than are read, in work and being written is never asked for, because a matrix is only handed
    to the writer when the one before it is written.
    """

    def __init__(self, work: TensorJob, source: TensorSource, names: Iterable[str]) -> None:
        nbytes = max((source.infos[name].nbytes for name in names if name in work.matrices), default=0)
        self._free = deque(torch.empty(nbytes, dtype=torch.uint8) for _ in range(work.parallelism + 2))
        self._taken: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """Room for a matrix."""
        self._taken[name] = self._free.popleft()
        return self._taken[name]

    def give_back(self, name: str) -> None:
        """The matrix is written."""
        self._free.append(self._taken.pop(name))


@contextmanager
def _computing(work: TensorJob) -> Iterator[Compute]:
    """Yield what starts to compute a matrix: several side by side, with their share of the threads."""
    if work.parallelism == 1:
        yield partial(_now, work.compute)
        return
    with worker_pool(work.parallelism) as pool:
        yield lambda name, tensor: pool.submit(work.compute, name, tensor)


def _now(compute: Callable[[str, Tensor], TensorResult], name: str, tensor: Tensor) -> Future[TensorResult]:
    """One at a time is computed in this thread, which may use settings of the whole process."""
    done: Future[TensorResult] = Future()
    done.set_result(compute(name, tensor))
    return done


@contextmanager
def _writing(
    work: TensorJob, source: TensorSource, staged: StagedOutput, names: Iterable[str], rooms: BufferPool
) -> Iterator["BackgroundWriter"]:
    """Yield what writes behind; leaving waits for it, and raises what went wrong there."""
    with ThreadPoolExecutor(1, "write") as pool, ThreadPoolExecutor(1, "sync") as syncing:
        open_items = Counter(work.copies.get(name, "") for name in names)
        for file in {*work.copies.values()} - open_items.keys():
            if staged.is_uploaded_early(file):  # an earlier run finished it, but could not send it any more
                staged.upload(file)
        behind = BackgroundWriter(work, source, staged, pool, syncing, open_items, rooms)
        yield behind
        behind.finish()


class BackgroundWriter:
    """Writes, notes and syncs in the background, one tensor at a time."""

    def __init__(  # noqa: PLR0913 (everything that a write touches)
        self,
        work: TensorJob,
        source: TensorSource,
        staged: StagedOutput,
        pool: ThreadPoolExecutor,
        syncing: ThreadPoolExecutor,
        open_items: Counter[str],
        rooms: BufferPool,
    ) -> None:
        self._work = work
        self._source = source
        self._staged = staged
        self._pool = pool
        self._syncing = syncing
        self._open_items = open_items
        self._rooms = rooms
        self._pending: deque[Future[Any]] = deque()
        self._syncs: list[Future[None]] = []
        self._unsynced: Counter[str] = Counter()

    def matrix(self, name: str, mark: str, outcome: TensorResult) -> None:
        """Have a computed matrix written, once nothing else waits: one outcome at most is in memory."""
        self.drain(0)
        self._pending.append(self._pool.submit(self._write, name, mark, outcome))

    def copy(self, name: str) -> None:
        """Have an untouched tensor copied; a few may wait, which take no memory."""
        self.drain(_COPIES)
        self._pending.append(self._pool.submit(self._copy, name))

    def drain(self, most: int) -> None:
        """Wait until at most `most` tasks are under way; raises what went wrong in one."""
        while len(self._pending) > most:
            self._pending.popleft().result()

    def finish(self) -> None:
        """Wait for everything; raises what went wrong."""
        self.drain(0)
        for sync in self._syncs:
            sync.result()

    def _write(self, name: str, mark: str, outcome: TensorResult) -> None:
        files: dict[str, dict[str, str]] = {}
        for (file, key), piece in outcome.tensors.items():
            passing = Checksum()
            self._staged.write(file, key, piece, passing.update)
            files.setdefault(file, {})[key] = passing.text()
            self._sync_behind(file, piece.nbytes)
        self._rooms.give_back(name)
        self._finish(name, {"source": mark, "files": files, "note": dict(outcome.note)})

    def _copy(self, name: str) -> None:
        passing = Checksum()
        chunks = self._source.chunks(name, CHUNK)
        file = self._work.copies.get(name)
        if file is None:
            for chunk in chunks:
                passing.update(chunk)
        else:
            self._staged.write_bytes(file, name, chunks, passing.update)
            self._sync_behind(file, self._source.infos[name].nbytes)
        mark = _expected(self._work, name, passing.text())
        self._finish(name, {"source": mark, "files": {file: {name: mark}} if file else {}})

    def _sync_behind(self, file: str, nbytes: int) -> None:
        """Keep the disk busy all the time, so that the end does not wait for it."""
        self._unsynced[file] += nbytes
        if self._unsynced[file] > _UNSYNCED and not self._staged.is_uploaded_early(file):
            self._unsynced[file] = 0
            self._syncs.append(self._syncing.submit(self._staged.sync, file))

    def _finish(self, name: str, record: dict[str, Any]) -> None:
        self._staged.finish(name, record)
        file = self._work.copies.get(name, "")
        self._open_items[file] -= 1
        if file and not self._open_items[file] and self._staged.is_uploaded_early(file):
            self._staged.upload(file)  # in this thread, so that nothing of the next file is written meanwhile
        elif file and not self._open_items[file]:
            self._syncs.append(self._syncing.submit(self._staged.sync, file))


def _expected(work: TensorJob, name: str, mark: str) -> str:
    wanted = work.expected.get(name, mark)
    if wanted != mark:
        raise ArtifactError(
            f"{name} of {work.origin} is not the tensor that the adapter was made for (checksum {mark}, "
            f"not {wanted}); give the right model"
        )
    return mark


def source_checksums(staged: StagedOutput) -> dict[str, str]:
    """Checksum of every source tensor that passed, by name."""
    read = sorted(item for item in staged.finished.items() if "source" in item[1])
    return {name: record["source"] for name, record in read}


def file_checksums(staged: StagedOutput) -> dict[str, dict[str, str]]:
    """Checksum of every tensor written, by file and name."""
    files: dict[str, dict[str, str]] = {}
    for record in staged.finished.values():
        for file, marks in record["files"].items():
            files.setdefault(file, {}).update(marks)
    return {file: dict(sorted(files[file].items())) for file in sorted(files)}


def notes(staged: StagedOutput, order: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What was noted about every matrix, in the given order."""
    return {name: staged.finished[name]["note"] for name in order}
