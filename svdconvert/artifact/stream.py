"""One tensor after the other from a source into a staged output: the whole scheduler.

Three things go on at once, each in a thread of its own: the next matrix is read, this one is
computed, the last one is written and noted. torch and the operating system let go of the interpreter
meanwhile. Memory is a matrix being read, one in work and one being written.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from svdconvert.artifact.fingerprint import CHUNK, Checksum, checksum
from svdconvert.checkpoint.source import TensorSource, tensor_bytes
from svdconvert.checkpoint.writer import StagedOutput
from svdconvert.errors import ArtifactError, CheckpointError
from svdconvert.progress import Progress
from svdconvert.run import Run

Place = tuple[str, str]
"""(file, name) of an output tensor."""

_WINDOW = 4  # shards per rank that are shared out together, so that finished shards come early


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one matrix."""

    tensors: Mapping[Place, Tensor]
    note: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done with each tensor of a source."""

    order: Sequence[str]
    """Names, in the order of the output's shards."""
    matrices: Mapping[str, Any]
    """The names that are computed; all others are copied."""
    compute: Callable[[str, Tensor], Outcome]
    """(name, tensor as stored) -> outcome."""
    copies: Mapping[str, str]
    """Name -> file of the output; what has none is only noted."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """Checksums that the source must have."""
    origin: str = ""
    """What to call the source in a complaint."""


def stream(work: Work, source: TensorSource, staged: StagedOutput, run: Run) -> None:
    """Do this rank's share of the work, from where an earlier run left it.

    What is noted about each tensor ends in `staged.finished`, of all ranks. Raises CheckpointError where
    the source changed under the run, ArtifactError where a tensor is not the expected one.
    """
    stamp = source.stamp()
    mine = _share(work, source, staged.ranks.count)[staged.ranks.index]
    left = [name for name in mine if name not in staged.finished]
    if len(left) < len(mine):
        run.say(f"going on from {staged.path}: {len(mine) - len(left)} of {len(mine)} tensors are done")
    sizes = {name: source.infos[name].nbytes for name in mine}
    done, total = sum(sizes.values()) - sum(sizes[name] for name in left), sum(sizes.values())
    with _writing(work, source, staged, left) as behind, _reading(work, source, left) as ahead:
        for name in left:
            if name in work.matrices:
                tensor, mark = ahead(name)
                outcome = work.compute(name, tensor)
                del tensor
                behind.matrix(name, mark, outcome)
                del outcome
            else:
                behind.copy(name)
            done += sizes[name]
            run.track(Progress(name, work.copies.get(name, ""), done, total))
    if source.stamp() != stamp:
        raise CheckpointError(f"{work.origin} was changed while it was read; restore it and use --overwrite")
    staged.gather()


def _share(work: Work, source: TensorSource, ranks: int) -> list[list[str]]:
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


def _cost(work: Work, source: TensorSource, name: str) -> float:
    """Bytes; a matrix is computed, which takes many times as long as copying it."""
    return source.infos[name].nbytes * (10.0 if name in work.matrices else 1.0)


@contextmanager
def _reading(
    work: Work, source: TensorSource, names: list[str]
) -> Iterator[Callable[[str], tuple[Tensor, str]]]:
    """Yield a function that returns (matrix, checksum) and has the next one read meanwhile."""
    matrices = deque(name for name in names if name in work.matrices)
    waiting: deque[Future[tuple[Tensor, str]]] = deque()

    def read(name: str) -> tuple[Tensor, str]:
        tensor = source.read(name)
        return tensor, _expected(work, name, checksum(tensor_bytes(tensor)))

    with ThreadPoolExecutor(1, "read") as pool:

        def take(name: str) -> tuple[Tensor, str]:
            if not waiting:
                waiting.append(pool.submit(read, matrices.popleft()))
            found = waiting.popleft().result()
            if matrices:
                waiting.append(pool.submit(read, matrices.popleft()))
            return found

        yield take


@contextmanager
def _writing(
    work: Work, source: TensorSource, staged: StagedOutput, names: Iterable[str]
) -> Iterator["_Behind"]:
    """Yield what writes behind; leaving waits for it, and raises what went wrong there."""
    with ThreadPoolExecutor(1, "write") as pool, ThreadPoolExecutor(1, "sync") as syncing:
        behind = _Behind(
            work, source, staged, pool, syncing, Counter(work.copies.get(name, "") for name in names)
        )
        yield behind
        behind.finish()


class _Behind:
    """Writes, notes and syncs in the background, one tensor at a time."""

    def __init__(  # noqa: PLR0913 (everything that a write touches)
        self,
        work: Work,
        source: TensorSource,
        staged: StagedOutput,
        pool: ThreadPoolExecutor,
        syncing: ThreadPoolExecutor,
        open_items: Counter[str],
    ) -> None:
        self._work, self._source, self._staged = work, source, staged
        self._pool, self._syncing, self._open_items = pool, syncing, open_items
        self._pending: deque[Future[Any]] = deque()
        self._syncs: list[Future[None]] = []

    def matrix(self, name: str, mark: str, outcome: Outcome) -> None:
        """Have a computed matrix written."""
        self._submit(self._pool, self._write, name, mark, outcome)

    def copy(self, name: str) -> None:
        """Have an untouched tensor copied."""
        self._submit(self._pool, self._copy, name)

    def drain(self, most: int) -> None:
        """Wait until at most `most` tasks are under way; raises what went wrong in one."""
        while len(self._pending) > most:
            self._pending.popleft().result()

    def finish(self) -> None:
        """Wait for everything; raises what went wrong."""
        self.drain(0)
        for sync in self._syncs:
            sync.result()

    def _submit(self, pool: ThreadPoolExecutor, task: Callable[..., None], *arguments: Any) -> None:
        self.drain(0)  # so that one outcome at most waits in memory beside the one in work
        self._pending.append(pool.submit(task, *arguments))

    def _write(self, name: str, mark: str, outcome: Outcome) -> None:
        files: dict[str, dict[str, str]] = {}
        for (file, key), piece in outcome.tensors.items():
            self._staged.write(file, key, piece)
            files.setdefault(file, {})[key] = checksum(tensor_bytes(piece))
        self._finish(name, {"source": mark, "files": files, "note": dict(outcome.note)})

    def _copy(self, name: str) -> None:
        passing = Checksum()
        chunks = passing.over(self._source.chunks(name, CHUNK))
        file = self._work.copies.get(name)
        if file is None:
            deque(chunks, maxlen=0)
        else:
            self._staged.write_bytes(file, name, chunks)
        mark = _expected(self._work, name, passing.text())
        self._finish(name, {"source": mark, "files": {file: {name: mark}} if file else {}})

    def _finish(self, name: str, record: dict[str, Any]) -> None:
        self._staged.finish(name, record)
        file = self._work.copies.get(name, "")
        self._open_items[file] -= 1
        if file and not self._open_items[file]:
            self._syncs.append(self._syncing.submit(self._staged.sync, file))


def _expected(work: Work, name: str, mark: str) -> str:
    wanted = work.expected.get(name, mark)
    if wanted != mark:
        raise ArtifactError(
            f"{name} of {work.origin} is not the tensor that the adapter was made for (checksum {mark}, "
            f"not {wanted}); give the right model"
        )
    return mark


def source_checksums(staged: StagedOutput) -> dict[str, str]:
    """Checksum of every source tensor that passed, by name."""
    return {name: record["source"] for name, record in sorted(staged.finished.items())}


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
