"""A directory that appears complete or not at all.

The files are laid out in the staging directory `<out>.partial` according to the plan, each tensor is written
at its offset, in any order, and a journal records what is finished. The directory is renamed to `<out>` when
it is complete.
"""

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import xxhash

from svdconvert.checkpoint.header import build_header
from svdconvert.checkpoint.parts import find_part
from svdconvert.checkpoint.tensors import OnChunk, TensorInfo, dtype_code, in_chunks, tensor_bytes
from svdconvert.config.execution import Run
from svdconvert.errors import OutputError, SvdConvertError
from svdconvert.output import pth_archive
from svdconvert.output.journal import Journal, Record, journals, other_journals, read_journal
from svdconvert.output.ownership import (
    JOURNAL,
    check_free,
    install,
    staging_directory,
    sync_directory,
    sync_tree,
)
from svdconvert.output.plan import PlannedFile
from svdconvert.output.shard_uploads import ShardUploads
from svdconvert.output.uncached import UncachedWriter

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 4 << 20  # bytes that are written at a time
_REMOVED = "the temporary files are removed"
_RESERVE = 16_000_000  # bytes of free space for sidecars and the manifest


class StagedOutput:
    """The output directory while it is written; a context manager.

    Leaving the context without an error renames the staging directory to the output directory. After an
    error the staging directory is kept if an item was finished or `keep` was called, so that the same command
    can continue; else it is removed. Several ranks write their own tensors into the same files; the leading
    rank lays the files out and renames the directory.
    """

    def __init__(
        self,
        out: Path,
        files: Sequence[PlannedFile],
        identity: Mapping[str, Any],
        run: Run,
    ) -> None:
        """Plan to write `files` into `out`. Nothing is changed until the context is entered.

        `identity` is what a later run must have in common with this one to continue it. With a shard sink
        in `run`, finished shards are uploaded and deleted, in the end all other files too, and `out` does not
        appear.
        """
        self.out = out
        self.ranks = run.ranks
        self.path = staging_directory(out)
        self.finished: dict[str, Record] = {}
        """Item -> its record, including those of earlier runs and, after `gather`, of other ranks."""
        self.temporary = {file.path for file in files if file.temporary}
        """The files that are removed when the directory is complete."""
        self._files = files
        self._identity = identity
        self._overwrite = run.overwrite
        self._positions: dict[tuple[str, str], tuple[int, TensorInfo]] = {}
        self._open: dict[str, int] = {}
        self._sums: dict[str, dict[str, int]] = {}
        self._journal: Journal | None = None
        self._writer = UncachedWriter()
        self._uploads = ShardUploads(self.path, files, identity, run.shard_sink) if run.shard_sink else None
        self._keep = False

    def __enter__(self) -> "StagedOutput":
        if self.ranks.leads:
            check_free(self.out, overwrite=self._overwrite)
            self._require_space()
        existed = self.path.exists()
        with os_errors_as_output_error(self.path):
            try:
                if self.ranks.leads:
                    self._lead()
                self.ranks.wait()
                if not self.ranks.leads:
                    self._join()
            except BaseException:
                # Without a journal the directory may be in use by another run.
                self._abandon(keep=existed or self._journal is None or not self.ranks.leads)
                raise
        return self

    def _lead(self) -> None:
        """Create the staging directory, or continue in that of an earlier run, and lay out the files."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.path / JOURNAL, self._identity, discard=self._overwrite)
        uploaded = self._take_over(self._journal)
        for path in other_journals(self.path):
            for item, record in read_journal(path)[1].items():
                self._journal.finish(item, record)
                self._journal.unsynced.add(item)
            path.unlink()
        for file in self._files:
            if file.path not in uploaded:
                self._lay_out(file, create=True)
        self._drop_lost_items(self._journal)
        self.finished |= self._journal.finished

    def _take_over(self, journal: Journal) -> set[str]:
        """Check what an earlier run left; return the files that it uploaded."""
        uploaded = self._uploads.find_uploaded(journal.finished) if self._uploads else set()
        # If a file was removed or truncated, the tensors in it are not finished any more.
        needed = [file for file in self._files if not (file.temporary and _REMOVED in journal.finished)]
        if not all(file.path in uploaded or _laid_out(self.path / file.path, file) for file in needed):
            journal.clear()
            uploaded = set()
        if not journal.resumed:
            _clear(self.path, except_for=JOURNAL)
        if self._uploads:
            self._uploads.open(discard=not uploaded)
        return uploaded

    def _drop_lost_items(self, journal: Journal) -> None:
        """Forget the items whose bytes a power cut has lost."""
        for item in sorted(journal.unsynced & journal.finished.keys()):
            if not self._is_written(journal.finished[item]):
                journal.drop(item)

    def _is_written(self, record: Record) -> bool:
        """True if the tensors of a record have the recorded checksums."""
        for file, checksums in record.get("files", {}).items():
            for name, checksum in checksums.items():
                if (file, name) not in self._positions:
                    continue  # it is uploaded
                offset, info = self._positions[file, name]
                total = xxhash.xxh3_64()
                for start in range(offset, offset + info.nbytes, _CHUNK):
                    size = min(_CHUNK, offset + info.nbytes - start)
                    total.update(os.pread(self._open[file], size, start))
                if total.hexdigest() != checksum:
                    return False
        return True

    def _join(self) -> None:
        """Open the files that the leading rank laid out."""
        self.finished |= read_journal(self.path / JOURNAL)[1]
        self._journal = Journal(self.path / f"journal-{self.ranks.index}.jsonl", self._identity, discard=True)
        for file in self._files:
            self._lay_out(file, create=False)

    def _require_space(self) -> None:
        present = (
            sum(path.stat().st_blocks * 512 for path in self.path.rglob("*")) if self.path.exists() else 0
        )
        kept = [file.nbytes for file in self._files if not self.is_uploaded_early(file.path)]
        uploaded = [file.nbytes for file in self._files if self.is_uploaded_early(file.path)]
        needed = sum(kept) + max(uploaded, default=0) + _RESERVE  # one uploaded file at a time is on disk
        disk = shutil.disk_usage(_existing(self.path))
        free = disk.free + present
        if needed > free and disk.total:  # /proc has no size; writing there gives a better error message
            raise OutputError(
                f"{self.out} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
                "free space or choose another -o"
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
            self._positions[file.path, info.name] = (offsets[info.name], info)
        wholes = {info.name: info for info in file.infos}
        for part in (find_part(wholes, info.name) for info in file.parts):
            assert part is not None, f"{file.path}: a part of a tensor that is not in the file"
            self._positions[file.path, part.info.name] = (offsets[part.whole] + part.begin, part.info)

    def write(self, file: str, name: str, tensor: "Tensor", on_chunk: OnChunk | None = None) -> None:
        """Write a tensor at its offset. Its shape and dtype must be the planned ones.

        `on_chunk` is called with every chunk before that is written. Raises OutputError if the disk is full.
        """
        _, info = self._positions[file, name]
        found = (tuple(tensor.shape), dtype_code(tensor.dtype))
        assert found == (info.shape, info.dtype), f"{name}: planned {info}, got {found}"
        self.write_bytes(file, name, in_chunks(tensor_bytes(tensor), _CHUNK), on_chunk)

    def write_bytes(
        self, file: str, name: str, chunks: Iterable[memoryview], on_chunk: OnChunk | None = None
    ) -> None:
        """Write a tensor, given as chunks of its bytes, at its offset."""
        offset, info = self._positions[file, name]
        end = offset + info.nbytes
        has_crc = file.endswith(pth_archive.ENDING)
        crc = 0
        for chunk in chunks:
            if on_chunk is not None:
                on_chunk(chunk)
            crc = zlib.crc32(chunk, crc) if has_crc else 0
            with os_errors_as_output_error(self.path / file):
                offset = self._put(file, chunk, offset)
        assert offset == end, f"{name}: {offset - end:+} bytes against the plan"
        if has_crc:
            self._sums.setdefault(file, {})[name] = crc

    def _put(self, file: str, chunk: memoryview, offset: int) -> int:
        """Write a chunk at `offset`; return the offset of its end."""
        while len(chunk):
            count = self._writer.write(self._open[file], chunk, offset)
            chunk = chunk[count:]
            offset += count
        return offset

    def finish(self, item: str, record: Record) -> None:
        """Record in the journal that everything that belongs to `item` is written."""
        assert self._journal is not None
        if self._sums:
            record = {**record, "crc32": self._sums}
            self._sums = {}
        with os_errors_as_output_error(self.path):
            self._journal.finish(item, record)
        self.finished[item] = record

    def keep(self) -> None:
        """Keep the staging directory even if the run is aborted before an item is finished."""
        self._keep = True

    def is_uploaded_early(self, file: str) -> bool:
        """True for a file that is uploaded as soon as it is finished."""
        return self._uploads is not None and self._uploads.is_uploaded_early(file)

    def upload(self, file: str) -> None:
        """Upload a finished file and delete it here, unless an earlier run did."""
        if self._uploads is None or file not in self._open:
            return
        with os_errors_as_output_error(self.path / file):
            self._uploads.upload(file)
            os.close(self._open.pop(file))

    def sync(self, file: str) -> None:
        """Wait until everything written to a file is on the disk, and record that."""
        assert self._journal is not None
        position = self._journal.begin_sync()
        with os_errors_as_output_error(self.path / file):
            os.fsync(self._open[file])
            self._journal.end_sync(file, position)

    def gather(self) -> None:
        """Wait for all ranks and add what they finished to `finished`."""
        self.ranks.wait()
        for path in journals(self.path) if self.ranks.count > 1 else []:
            self.finished |= read_journal(path)[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with os_errors_as_output_error(self.path):
            if error is not None:
                self._abandon(keep=self._keep or bool(self.finished) or self.ranks.count > 1)
                if isinstance(error, OSError):
                    raise error
                return
            try:
                self.ranks.wait()
                if self.ranks.leads:
                    self._complete()
            finally:
                self._close()
            self.ranks.wait()

    def _complete(self) -> None:
        """Sync all files and rename the staging directory, or upload what is left in it."""
        self._remove_temporary_files()
        for file in self._files:
            if file.path not in self._open:
                continue  # it is uploaded
            if file.path.endswith(pth_archive.ENDING):
                pth_archive.seal(self.path / file.path, self._crcs(file.path), file.infos)
            self.sync(file.path)
        if self._uploads:
            self._uploads.finish()
            self._close()
            shutil.rmtree(self.path)
            return
        sync_tree(self.path)
        check_free(self.out, overwrite=self._overwrite)
        for path in other_journals(self.path):
            path.unlink()
        self._install()

    def _remove_temporary_files(self) -> None:
        """Delete them, and record that: a later run must not take their absence for a loss."""
        temporary = [file.path for file in self._files if file.temporary]
        if temporary:
            self.finish(_REMOVED, {"files": {}})
        for path in temporary:
            os.close(self._open.pop(path))
            (self.path / path).unlink()

    def _install(self) -> None:
        """Rename the staging directory, without its journal, which is put back if that fails."""
        journal = (self.path / JOURNAL).read_bytes()
        (self.path / JOURNAL).unlink()
        try:
            install(self.path, self.out)
        except (OSError, OutputError):
            (self.path / JOURNAL).write_bytes(journal)
            raise
        try:
            sync_directory(self.out)
            sync_directory(self.out.absolute().parent)
        except OSError as error:
            raise OutputError(
                f"{self.out} is complete, but may not outlast a power cut: {error.strerror}; check the disk"
            ) from error

    def _crcs(self, file: str) -> dict[str, int]:
        """Tensor -> CRC-32 of a .pth file, as recorded when each was written."""
        noted = [record.get("crc32", {}).get(file, {}) for record in self.finished.values()]
        return {name: crc for sums in noted for name, crc in sums.items()}

    def _abandon(self, *, keep: bool) -> None:
        """Close all files after an error, and remove the staging directory unless it is to be kept."""
        with suppress(OSError):  # the error that ended the run is reported, not what follows from it
            if self._journal is not None:
                self._journal.sync()
        with suppress(OSError):
            self._close()
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)

    def _close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
        if self._journal is not None:
            self._journal.close()
        if self._uploads is not None:
            self._uploads.close()


def recorded(out: Path, key: str) -> Any:
    """The entry `key` in the identity of an unfinished run for `out`; None if there is no such run."""
    return read_journal(staging_directory(out) / JOURNAL)[0].get(key)


@contextmanager
def os_errors_as_output_error(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names `path`, or the file that the OSError names."""
    try:
        yield
    except SvdConvertError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{error.filename or path} cannot be written: {reason}; correct that and repeat the command"
        ) from error


def _laid_out(path: Path, file: PlannedFile) -> bool:
    """True if the file exists with the planned size."""
    if path.suffix == pth_archive.ENDING:
        return pth_archive.is_laid_out(path, file.infos)
    header, _ = build_header(file.infos)
    return path.is_file() and path.stat().st_size == len(header) + file.nbytes


def _clear(directory: Path, *, except_for: str) -> None:
    """Delete everything in a directory but one file."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != except_for:
            path.unlink()


def _existing(path: Path) -> Path:
    """The nearest directory above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())
