"""A directory that appears whole or not at all.

The files are laid out in `<out>.partial` from the plan, each tensor is written at its offset, in
any order, and what is finished is kept in a journal. Only a complete directory gets its name.
"""

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.header import build_header
from svdconvert.checkpoint.tensors import Passing, TensorInfo, dtype_code, pieces, tensor_bytes
from svdconvert.config.execution import Run
from svdconvert.errors import OutputError, SvdConvertError
from svdconvert.output import pth_archive
from svdconvert.output.journal import Journal, Record, journals, read_journal
from svdconvert.output.plan import PlannedFile
from svdconvert.output.shard_uploads import ShardUploads
from svdconvert.output.uncached import UncachedWriter

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST_NAME = "svdconvert.json"
JOURNAL = "journal.jsonl"
_PIECE = 4 << 20  # bytes that are looked at and written at a time; a disk likes more than a cache holds
_RESERVE = 16_000_000  # for sidecars and the manifest, when the free space is checked


class StagedOutput:
    """The output directory while it is being made; a context manager.

    Leaving the context without an error gives the directory its name. An error leaves the staging
    directory for the same command to go on from, or nothing where no tensor was finished. With several
    ranks each writes its own tensors into the same files; the leading one lays out and finishes.
    """

    def __init__(
        self,
        out: Path,
        files: Sequence[PlannedFile],
        identity: Mapping[str, Any],
        run: Run,
    ) -> None:
        """Plan `files` below `out`. Nothing is touched until the context is entered.

        With a shipment in `run` finished shards are sent off and deleted, and in the end so is all the rest.
        """
        self.out, self.ranks = out, run.ranks
        self.path = partial(out)
        self.finished: dict[str, Record] = {}
        """What was noted about each finished item, by earlier runs too; by other ranks after `gather`."""
        self._files, self._identity, self._overwrite = files, identity, run.overwrite
        self._places: dict[tuple[str, str], tuple[int, TensorInfo]] = {}
        self._open: dict[str, int] = {}
        self._sums: dict[str, dict[str, int]] = {}
        self._journal: Journal | None = None
        self._writer = UncachedWriter()
        self._keep = False
        self._departed = ShardUploads(self.path, files, identity, run.shard_sink) if run.shard_sink else None

    def __enter__(self) -> "StagedOutput":
        if self.ranks.leads:
            check_free(self.out, overwrite=self._overwrite)
            self._require_space()
        existed = self.path.exists()
        with explained(self.path):
            try:
                if self.ranks.leads:
                    self._lead()
                self.ranks.wait()
                if not self.ranks.leads:
                    self._join()
            except BaseException:
                # Without a journal it was never ours: another run may have it.
                self._abandon(keep=existed or self._journal is None or not self.ranks.leads)
                raise
        return self

    def _lead(self) -> None:
        """Take the staging directory and what an earlier run finished, and lay out the files."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.path / JOURNAL, self._identity, anew=self._overwrite)
        gone = self._departed.known(self._journal.finished) if self._departed else set()
        # A file that was removed or cut took its finished tensors with it.
        whole = all(file.path in gone or _laid_out(self.path / file.path, file) for file in self._files)
        if not whole:
            self._journal.forget()
            gone = set()
        if not self._journal.resumed:
            _clear(self.path, except_for=JOURNAL)
        if self._departed:
            self._departed.open(anew=not gone)
        for path in journals(self.path)[1:]:
            for item, record in read_journal(path)[1].items():
                self._journal.finish(item, record)
            path.unlink()
        self.finished |= self._journal.finished
        for file in self._files:
            if file.path not in gone:
                self._lay_out(file, create=True)

    def _join(self) -> None:
        """Open what the leading rank laid out."""
        self.finished |= read_journal(self.path / JOURNAL)[1]
        self._journal = Journal(self.path / f"journal-{self.ranks.index}.jsonl", self._identity, anew=True)
        for file in self._files:
            self._lay_out(file, create=False)

    def _require_space(self) -> None:
        present = (
            sum(path.stat().st_blocks * 512 for path in self.path.rglob("*")) if self.path.exists() else 0
        )
        staying = [file.nbytes for file in self._files if not self.departs(file.path)]
        leaving = [file.nbytes for file in self._files if self.departs(file.path)]
        needed = sum(staying) + max(leaving, default=0) + _RESERVE  # of those one at a time is here
        disk = shutil.disk_usage(_existing(self.path))
        free = disk.free + present
        if needed > free and disk.total:  # /proc and its like have no size; they say themselves what is wrong
            raise OutputError(
                f"{self.out} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
                "make room or choose another -o"
            )

    def _lay_out(self, file: PlannedFile, *, create: bool) -> None:
        path = self.path / file.path
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == pth_archive.ENDING and create and not _laid_out(path, file):
            pth_archive.lay_out(path, file.infos)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._open[file.path] = descriptor
        if path.suffix == pth_archive.ENDING:
            offsets: Mapping[str, int] = pth_archive.offsets(path, file.infos)
        else:
            header, offsets = build_header(file.infos)
            if create:
                os.ftruncate(descriptor, len(header) + file.nbytes)
                self._put(file.path, memoryview(header), 0)
        for info in file.infos:
            self._places[file.path, info.name] = (offsets[info.name], info)

    def write(self, file: str, name: str, tensor: "Tensor", over: Passing = iter) -> None:
        """Put a tensor at its place, `over` which its pieces pass. Its shape and dtype are those planned."""
        _, info = self._places[file, name]
        found = (tuple(tensor.shape), dtype_code(tensor.dtype))
        assert found == (info.shape, info.dtype), f"{name}: planned {info}, got {found}"
        self.write_bytes(file, name, over(pieces(tensor_bytes(tensor), _PIECE)))

    def write_bytes(self, file: str, name: str, chunks: Iterable[memoryview]) -> None:
        """Put a tensor's bytes at its place, piece by piece."""
        offset, info = self._places[file, name]
        end = offset + info.nbytes
        summed, crc = file.endswith(pth_archive.ENDING), 0
        for chunk in chunks:
            crc = zlib.crc32(chunk, crc) if summed else 0
            with explained(self.path / file):
                offset = self._put(file, chunk, offset)
        assert offset == end, f"{name}: {offset - end:+} bytes against the plan"
        if summed:
            self._sums.setdefault(file, {})[name] = crc

    def _put(self, file: str, chunk: memoryview, offset: int) -> int:
        """Write all of a chunk; return where it ends."""
        while len(chunk):
            count = self._writer.write(self._open[file], chunk, offset)
            chunk, offset = chunk[count:], offset + count
        return offset

    def finish(self, item: str, record: Record) -> None:
        """Note that everything of `item` is written."""
        assert self._journal is not None
        if self._sums:
            record, self._sums = {**record, "crc32": self._sums}, {}
        with explained(self.path):
            self._journal.finish(item, record)
        self.finished[item] = record

    def keep(self) -> None:
        """Keep the staging directory even if the run is aborted before an item is finished."""
        self._keep = True

    def departs(self, file: str) -> bool:
        """True for a file that is sent off as soon as it is finished."""
        return self._departed is not None and self._departed.leaves(file)

    def depart(self, file: str) -> None:
        """Send a finished file off, unless that is done."""
        if self._departed is None or file not in self._open:
            return
        with explained(self.path / file):
            self._departed.send(file)
            os.close(self._open.pop(file))

    def sync(self, file: str) -> None:
        """Put what is written of a file on the disk itself."""
        with explained(self.path / file):
            os.fsync(self._open[file])

    def gather(self) -> None:
        """Wait for all ranks and take in what they finished."""
        self.ranks.wait()
        for path in journals(self.path) if self.ranks.count > 1 else []:
            self.finished |= read_journal(path)[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with explained(self.path):
            if error is not None:
                self._abandon(keep=self._keep or bool(self.finished) or self.ranks.count > 1)
                if isinstance(error, OSError):
                    raise error
                return
            self.ranks.wait()
            if self.ranks.leads:
                self._complete()
            self._close()
            self.ranks.wait()

    def _complete(self) -> None:
        for file in self._files:
            if file.path not in self._open:
                continue  # it has left
            if file.path.endswith(pth_archive.ENDING):
                pth_archive.seal(self.path / file.path, self._crcs(file.path), file.infos)
            self.sync(file.path)
        if self._departed:
            self._departed.finish()
            self._close()
            shutil.rmtree(self.path)
            return
        self._close()
        for path in journals(self.path):
            path.unlink()
        aside = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            shutil.rmtree(aside, ignore_errors=True)
            self.out.rename(aside)
        self.path.rename(self.out)
        shutil.rmtree(aside, ignore_errors=True)

    def _crcs(self, file: str) -> dict[str, int]:
        """The CRC-32 of every tensor of a file, as noted when it was written."""
        noted = [record.get("crc32", {}).get(file, {}) for record in self.finished.values()]
        return {name: crc for sums in noted for name, crc in sums.items()}

    def _abandon(self, *, keep: bool) -> None:
        """Close everything; keep the staging directory only where there is something to go on from."""
        self._close()
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)

    def _close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
        if self._journal is not None:
            self._journal.close()
        if self._departed is not None:
            self._departed.close()


def partial(out: Path) -> Path:
    """The staging directory of `out`. Raises OutputError where that has no name of its own."""
    if out.name in ("", ".."):
        raise OutputError(f"{out} is not a directory that can be made; give -o a name of its own")
    return out.with_name(out.name + ".partial")


def recorded(out: Path, key: str) -> Any:
    """What an unfinished run for `out` noted of itself under `key`; None where there is none."""
    return read_journal(partial(out) / JOURNAL)[0].get(key)


def check_apart(out: Path, *inputs: Path | None) -> None:
    """Raise OutputError where `out` is, holds or lies in a directory that is read."""
    target = out.resolve()
    for place in (path.resolve() for path in inputs if path is not None):
        if target == place or target in place.parents or place in target.parents:
            raise OutputError(f"{out} overlaps {place}, which is read; choose an -o of its own")


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless `out` is absent, an empty directory, or ours to overwrite."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} exists and is not a directory; choose another -o")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out} exists and is not empty; choose another -o, or --overwrite to replace it")
    if not (out / MANIFEST_NAME).is_file():
        raise OutputError(f"{out} was not written by svdconvert and is not overwritten; choose another -o")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's complaint into a sentence about the output."""
    try:
        yield
    except SvdConvertError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{error.filename or path} cannot be written: {reason}; mend that and run the same command again"
        ) from error


def _laid_out(path: Path, file: PlannedFile) -> bool:
    """True where the file stands with the size of the plan."""
    if path.suffix == pth_archive.ENDING:
        return pth_archive.is_laid_out(path, file.infos)
    header, _ = build_header(file.infos)
    return path.is_file() and path.stat().st_size == len(header) + file.nbytes


def _clear(directory: Path, *, except_for: str) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != except_for:
            path.unlink()


def _existing(path: Path) -> Path:
    """The nearest directory above `path` that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())
