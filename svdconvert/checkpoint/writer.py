"""A directory that appears whole or not at all.

The files are laid out in `<out>.partial` from the plan, each tensor is written at its offset, in
any order, and what is finished is kept in a journal. Only a complete directory gets its name.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.header import build_header
from svdconvert.checkpoint.journal import Journal, Record
from svdconvert.checkpoint.shards import PlannedFile
from svdconvert.checkpoint.source import TensorInfo, dtype_code, tensor_bytes
from svdconvert.errors import OutputError, SvdConvertError

if TYPE_CHECKING:
    from torch import Tensor

MARK = "svdconvert.json"
_JOURNAL = "journal.jsonl"
_RESERVE = 16_000_000  # for sidecars and the manifest, when the free space is checked


class StagedOutput:
    """The output directory while it is being made; a context manager.

    Leaving the context without an error gives the directory its name. An error leaves the staging
    directory for the same command to go on from, or nothing where no tensor was finished.
    """

    def __init__(
        self, out: Path, files: Sequence[PlannedFile], *, identity: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        """Plan `files` below `out`. Nothing is touched until the context is entered."""
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self._files, self._identity, self._overwrite = files, identity, overwrite
        self._places: dict[tuple[str, str], tuple[int, TensorInfo]] = {}
        self._open: dict[str, int] = {}
        self._journal: Journal | None = None

    def __enter__(self) -> "StagedOutput":
        check_free(self.out, overwrite=self._overwrite)
        existed = self.path.exists()
        self._require_space()
        with explained(self.path):
            try:
                self._stage()
            except BaseException:
                self._abandon(keep=existed)
                raise
        return self

    def _stage(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.path / _JOURNAL, self._identity, anew=self._overwrite)
        if not self._journal.finished:
            _clear(self.path, except_for=_JOURNAL)
        for file in self._files:
            self._lay_out(file)

    @property
    def finished(self) -> Mapping[str, Record]:
        """What was noted about each finished item, by an earlier run too."""
        assert self._journal is not None
        return self._journal.finished

    def _require_space(self) -> None:
        present = (
            sum(path.stat().st_blocks * 512 for path in self.path.rglob("*")) if self.path.exists() else 0
        )
        needed = sum(file.nbytes for file in self._files) + _RESERVE
        free = shutil.disk_usage(_existing(self.path)).free + present
        if needed > free:
            raise OutputError(
                f"{self.out} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
                "make room or choose another -o"
            )

    def _lay_out(self, file: PlannedFile) -> None:
        path = self.path / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        header, offsets = build_header(file.infos)
        for info in file.infos:
            self._places[file.path, info.name] = (offsets[info.name], info)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._open[file.path] = descriptor
        os.ftruncate(descriptor, len(header) + file.nbytes)
        os.pwrite(descriptor, header, 0)

    def write(self, file: str, name: str, tensor: "Tensor") -> None:
        """Put a tensor at its place. Its shape and dtype are those of the plan."""
        _, info = self._places[file, name]
        found = (tuple(tensor.shape), dtype_code(tensor.dtype))
        assert found == (info.shape, info.dtype), f"{name}: planned {info}, got {found}"
        self.write_bytes(file, name, [tensor_bytes(tensor)])

    def write_bytes(self, file: str, name: str, chunks: Iterable[memoryview]) -> None:
        """Put a tensor's bytes at its place, piece by piece."""
        offset, info = self._places[file, name]
        end = offset + info.nbytes
        for chunk in chunks:
            with explained(self.path / file):
                while len(chunk):
                    count = os.pwrite(self._open[file], chunk, offset)
                    chunk, offset = chunk[count:], offset + count
        assert offset == end, f"{name}: {offset - end:+} bytes against the plan"

    def finish(self, item: str, record: Record) -> None:
        """Note that everything of `item` is written."""
        assert self._journal is not None
        with explained(self.path):
            self._journal.finish(item, record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with explained(self.path):
            if error is None:
                self._complete()
                return
            self._abandon(keep=bool(self.finished))
            if isinstance(error, OSError):
                raise error

    def _complete(self) -> None:
        for descriptor in self._open.values():
            os.fsync(descriptor)
        self._close()
        (self.path / _JOURNAL).unlink()
        aside = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            shutil.rmtree(aside, ignore_errors=True)
            self.out.rename(aside)
        self.path.rename(self.out)
        shutil.rmtree(aside, ignore_errors=True)

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
    if not (out / MARK).is_file():
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


def _clear(directory: Path, *, except_for: str) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != except_for:
            path.unlink()


def _existing(path: Path) -> Path:
    """The nearest directory above `path` that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())
