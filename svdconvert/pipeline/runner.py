"""The scheduler: processes a source tensor by tensor, from reading to writing.

Reading, computing and writing run in separate threads, which overlap because torch and system calls release
the GIL. At any time one matrix is read, `parallelism` matrices are computed and one is written; their buffers
are allocated once and reused.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.config.execution import Run
from svdconvert.config.progress import report
from svdconvert.errors import ArtifactError, CheckpointError
from svdconvert.linalg.threads import CPU, float32_products, worker_pool
from svdconvert.manifest.fingerprint import CHUNK, Checksum
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.transfers import host_buffer, to_device, to_host
from svdconvert.quantization.view import computed_nbytes, read_to_compute

Place = tuple[str, str]
"""(file, name) of an output tensor."""

_UNSYNCED = 256 << 20  # bytes of a file after which it is synced to the disk
_COPIES = 4  # copies that may wait for the writer while matrices are read and computed
_WINDOW = 4  # shards per rank that are distributed together, so that the first shards are finished early


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What one matrix was turned into."""

    tensors: Mapping[Place, Tensor]
    note: Mapping[str, Any] = field(default_factory=dict)
    """Measurements for the manifest."""


@dataclass(frozen=True, kw_only=True)
class TensorJob:
    """What to do with each tensor of a source."""

    order: Sequence[str]
    """The names of the tensors, in the order of the output's shards."""
    matrices: Mapping[str, Any]
    """The names of the tensors that are computed; all others are copied."""
    compute: Callable[[str, Tensor], TensorResult]
    """(name, tensor as stored, on `device`) -> result, on any device.

    A quantised weight is decoded to float32. The tensor may be overwritten, and may be part of the result.
    """
    copies: Mapping[str, str]
    """Name -> file of the output; a tensor without a file is read for its checksum only."""
    device: torch.device = CPU
    """Where matrices are computed."""
    parallelism: int = 1
    """How many matrices may be computed at the same time."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """The checksums that tensors of the source must have, by name."""
    origin: str = ""
    """The name of the source in error messages."""


ReadNext = Callable[[], tuple[Tensor, str]]
"""() -> the next matrix and its checksum."""
Compute = Callable[[str, Tensor], Future[TensorResult]]


def stream(job: TensorJob, source: TensorSource, staged: StagedOutput, run: Run) -> None:
    """Process this rank's share of the tensors, without those that an earlier run has finished.

    Afterwards `staged.finished` has the records of all ranks. Raises CheckpointError if the source was
    changed during the run, ArtifactError if a tensor does not have the expected checksum.
    """
    file_versions = source.file_versions()
    own_names = _share(job, source, staged.ranks.count)[staged.ranks.index]
    remaining = [name for name in own_names if name not in staged.finished]
    finished = len(own_names) - len(remaining)
    if finished:
        run.notify(f"going on from {staged.path}: {finished} of {len(own_names)} tensors are done")
    sizes = {name: source.infos[name].nbytes for name in own_names}
    total = sum(sizes.values())
    done = total - sum(sizes[name] for name in remaining)
    report(None, done, total, "bytes")
    buffers = BufferPool(job, source, remaining)
    with (
        _writing(job, source, staged, remaining, buffers) as writer,
        _reading(job, source, remaining, buffers) as read_next,
        float32_products(),
        _computing(job, buffers) as compute,
    ):
        for name in _process(job, remaining, read_next, compute, writer):
            done += sizes[name]
            report(None, done, total, "bytes", name=name, file=job.copies.get(name, ""))
    if source.file_versions() != file_versions:
        raise CheckpointError(f"{job.origin} was changed while it was read; restore it and use --overwrite")
    staged.gather()


def _process(
    job: TensorJob, names: Iterable[str], read_next: ReadNext, compute: Compute, writer: "BackgroundWriter"
) -> Iterator[str]:
    """Yield every name once its result, or its copy, is queued for writing."""
    computing: dict[Future[TensorResult], tuple[str, str]] = {}

    def write_results(limit: int) -> Iterator[str]:
        """Queue results for writing until at most `limit` matrices are being computed."""
        while len(computing) > limit:
            for future in wait(computing, return_when=FIRST_COMPLETED).done:
                name, checksum = computing.pop(future)
                writer.write(name, checksum, future.result())
                del future  # so that the result is freed as soon as it is written
                yield name

    for name in names:
        if name in job.matrices:
            tensor, checksum = read_next()
            computing[compute(name, tensor)] = (name, checksum)
            del tensor
            yield from write_results(job.parallelism - 1)
        else:
            writer.copy(name)
            yield name
    yield from write_results(0)


def _share(job: TensorJob, source: TensorSource, ranks: int) -> list[list[str]]:
    """The names that each rank processes, each list in the order of the job.

    Within a window of shards the most expensive tensors are assigned first, each to the rank with the least
    load.
    """
    if ranks == 1:
        return [list(job.order)]
    files = list(dict.fromkeys(job.copies.get(name, "") for name in job.order))
    window_of_file = {file: index // (_WINDOW * ranks) for index, file in enumerate(files)}
    windows: dict[int, list[str]] = {}
    for name in job.order:
        windows.setdefault(window_of_file[job.copies.get(name, "")], []).append(name)
    shares: list[list[str]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for names in windows.values():
        position = {name: index for index, name in enumerate(names)}
        assigned: list[list[str]] = [[] for _ in range(ranks)]
        for name in sorted(names, key=lambda name: -_cost(job, source, name)):
            rank = load.index(min(load))
            load[rank] += _cost(job, source, name)
            assigned[rank].append(name)
        for rank in range(ranks):
            shares[rank] += sorted(assigned[rank], key=position.__getitem__)
    return shares


def _cost(job: TensorJob, source: TensorSource, name: str) -> float:
    """Bytes of a tensor, times ten for a matrix: computing it takes much longer than copying it."""
    return source.infos[name].nbytes * (10.0 if name in job.matrices else 1.0)


@contextmanager
def _reading(
    job: TensorJob, source: TensorSource, names: Iterable[str], buffers: "BufferPool"
) -> Iterator[ReadNext]:
    """Yield a function that returns the next matrix and starts to read the one after it."""
    matrices = deque(name for name in names if name in job.matrices)
    pending: deque[Future[tuple[Tensor, str]]] = deque()

    def read(name: str, buffer: Tensor) -> tuple[Tensor, str]:
        hasher = Checksum()
        tensor = read_to_compute(source, name, buffer, hasher.update, CHUNK)
        return tensor, _checked(job, name, hasher.text())

    # The threads are those of the workers: a source that computes what it reads would wait for them.
    start = partial(torch.set_num_threads, 1) if job.parallelism > 1 else None
    with ThreadPoolExecutor(1, "read", start) as pool:

        def start_reading() -> None:
            name = matrices.popleft()
            pending.append(pool.submit(read, name, buffers.take(name)))

        def read_next() -> tuple[Tensor, str]:
            found = pending.popleft().result()
            if matrices:
                start_reading()
            return found

        if matrices:
            start_reading()
        yield read_next


class BufferPool:
    """Buffers of the size of the largest matrix: taken to read a matrix, returned once it is written.

    `parallelism` + 2 are enough, because a result is only queued for writing once the one before it is
    written: one matrix is read, `parallelism` are computed and one is written. The buffer that was returned
    last is taken first, so that one which is not needed gets no memory from the system.
    """

    def __init__(self, job: TensorJob, source: TensorSource, names: Iterable[str]) -> None:
        nbytes = max((computed_nbytes(source, name) for name in names if name in job.matrices), default=0)
        self._free = [host_buffer(nbytes, job.device) for _ in range(job.parallelism + 2)]
        self._taken: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """A buffer for the matrix `name`."""
        self._taken[name] = self._free.pop()
        return self._taken[name]

    def of(self, name: str) -> Tensor:
        """The buffer that was taken for the matrix `name`."""
        return self._taken[name]

    def give_back(self, name: str) -> None:
        """Free the buffer of the matrix `name`."""
        self._free.append(self._taken.pop(name))


@contextmanager
def _computing(job: TensorJob, buffers: BufferPool) -> Iterator[Compute]:
    """Yield a function that computes a matrix, in this thread or in one of several that share the cores."""

    def compute(name: str, stored: Tensor) -> TensorResult:
        result = job.compute(name, to_device(stored, job.device))
        return replace(result, tensors=to_host(result.tensors, job.device, buffers.of(name)))

    if job.parallelism == 1:
        yield partial(_compute_now, compute)
        return
    with worker_pool(job.parallelism, job.device) as pool:
        yield lambda name, stored: pool.submit(compute, name, stored)


def _compute_now(
    compute: Callable[[str, Tensor], TensorResult], name: str, tensor: Tensor
) -> Future[TensorResult]:
    """Compute in the calling thread, alone, so that process-wide settings may be changed meanwhile."""
    done: Future[TensorResult] = Future()
    done.set_result(compute(name, tensor))
    return done


@contextmanager
def _writing(
    job: TensorJob, source: TensorSource, staged: StagedOutput, names: Iterable[str], buffers: BufferPool
) -> Iterator["BackgroundWriter"]:
    """Yield a writer; leaving the context waits for it and raises the errors of its threads."""
    with ThreadPoolExecutor(1, "write") as write_pool, ThreadPoolExecutor(1, "sync") as sync_pool:
        unfinished = Counter(job.copies.get(name, "") for name in names)
        for file in {*job.copies.values()} - unfinished.keys():
            if staged.is_uploaded_early(file):  # an earlier run finished it and was stopped before the upload
                staged.upload(file)
        writer = BackgroundWriter(
            job=job,
            source=source,
            staged=staged,
            buffers=buffers,
            unfinished=unfinished,
            write_pool=write_pool,
            sync_pool=sync_pool,
        )
        yield writer
        writer.finish()


@dataclass(kw_only=True)
class BackgroundWriter:
    """Writes tensors, records them as finished and syncs their files, in background threads."""

    job: TensorJob
    source: TensorSource
    staged: StagedOutput
    buffers: BufferPool
    unfinished: Counter[str]
    """How many tensors of each file are still to be written."""
    write_pool: ThreadPoolExecutor
    """One thread, so that one tensor is written at a time."""
    sync_pool: ThreadPoolExecutor
    _pending: deque[Future[None]] = field(default_factory=deque, init=False)
    _syncs: list[Future[None]] = field(default_factory=list, init=False)
    _unsynced: Counter[str] = field(default_factory=Counter, init=False)

    def write(self, name: str, checksum: str, result: TensorResult) -> None:
        """Queue the result of a matrix once nothing else is waiting: at most one result is in memory.

        The buffer of a matrix of which only measurements are recorded is free at once.
        """
        self.drain(0)
        if not result.tensors:
            self.buffers.give_back(name)
        self._pending.append(self.write_pool.submit(self._write, name, checksum, result))

    def copy(self, name: str) -> None:
        """Queue the copy of a tensor; a few may wait, because a waiting copy takes no memory."""
        self.drain(_COPIES)
        self._pending.append(self.write_pool.submit(self._copy, name))

    def drain(self, limit: int) -> None:
        """Wait until at most `limit` tensors are queued. Raises the error of one that failed."""
        while len(self._pending) > limit:
            self._pending.popleft().result()

    def finish(self) -> None:
        """Wait until everything is written and synced. Raises the error of what failed."""
        self.drain(0)
        for sync in self._syncs:
            sync.result()

    def _write(self, name: str, source_checksum: str, result: TensorResult) -> None:
        files: dict[str, dict[str, str]] = {}
        for (file, key), tensor in result.tensors.items():
            hasher = Checksum()
            self.staged.write(file, key, tensor, hasher.update)
            files.setdefault(file, {})[key] = hasher.text()
            self._sync_sometimes(file, tensor.nbytes)
        if result.tensors:
            self.buffers.give_back(name)
        self._finish(name, {"source": source_checksum, "files": files, "note": dict(result.note)})

    def _copy(self, name: str) -> None:
        hasher = Checksum()
        chunks = self.source.chunks(name, CHUNK)
        file = self.job.copies.get(name)
        if file is None:
            for chunk in chunks:
                hasher.update(chunk)
        else:
            self.staged.write_bytes(file, name, chunks, hasher.update)
            self._sync_sometimes(file, self.source.infos[name].nbytes)
        checksum = _checked(self.job, name, hasher.text())
        self._finish(name, {"source": checksum, "files": {file: {name: checksum}} if file else {}})

    def _sync_sometimes(self, file: str, nbytes: int) -> None:
        """Sync a file after every 256 MiB, so that little is left to be synced at the end."""
        self._unsynced[file] += nbytes
        if self._unsynced[file] > _UNSYNCED and not self.staged.is_uploaded_early(file):
            self._unsynced[file] = 0
            self._syncs.append(self.sync_pool.submit(self.staged.sync, file))

    def _finish(self, name: str, record: dict[str, Any]) -> None:
        self.staged.finish(name, record)
        file = self.job.copies.get(name, "")
        self.unfinished[file] -= 1
        if file and not self.unfinished[file] and self.staged.is_uploaded_early(file):
            self.staged.upload(file)  # in this thread, so that nothing of the next file is written meanwhile
        elif file and not self.unfinished[file]:
            self._syncs.append(self.sync_pool.submit(self.staged.sync, file))


def _checked(job: TensorJob, name: str, checksum: str) -> str:
    """The checksum of a tensor. Raises ArtifactError if it is not the expected one."""
    expected = job.expected.get(name, checksum)
    if expected != checksum:
        raise ArtifactError(
            f"{name} of {job.origin} is not the tensor that the adapter was made for (checksum {checksum}, "
            f"not {expected}); give the right model"
        )
    return checksum


def source_checksums(staged: StagedOutput) -> dict[str, str]:
    """Checksum of every source tensor that was read, by name."""
    read = sorted(item for item in staged.finished.items() if "source" in item[1])
    return {name: record["source"] for name, record in read}


def file_checksums(staged: StagedOutput) -> dict[str, dict[str, str]]:
    """Checksum of every tensor or part written into a file that stays, by file and name."""
    files: dict[str, dict[str, str]] = {}
    for record in staged.finished.values():
        for file, checksums in record["files"].items():
            if file not in staged.temporary:
                files.setdefault(file, {}).update(checksums)
    return {file: dict(sorted(files[file].items())) for file in sorted(files)}


def notes(staged: StagedOutput, order: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The measurements of every matrix, in the given order."""
    return {name: staged.finished[name]["note"] for name in order}
