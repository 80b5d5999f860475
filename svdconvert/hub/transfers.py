"""The progress of downloads and uploads, in place of huggingface_hub's own bars."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from svdconvert.config.progress import Progress, Track, current_track, is_followed

Count = Callable[[Any], Any]
"""An operation of a commit -> the same, whose bytes are counted when they are sent."""


class Transfer:
    """Counts the bytes of one transfer, which several threads may add to.

    An exception of the callback is kept for `finish`: in the threads of huggingface_hub it would count as a
    failure of the network.
    """

    def __init__(self, phase: str, total: int | None, name: str) -> None:
        self._track: Track = current_track()
        self._phase = phase
        self._total = total
        self._name = name
        self._done = 0
        self._error: BaseException | None = None
        self._lock = Lock()
        self.advance_to(0)

    def add(self, nbytes: int) -> None:
        """Count `nbytes` more."""
        self.advance_to(self._done + nbytes)

    def advance_to(self, done: int) -> None:
        """Report that `done` bytes are transferred."""
        with self._lock:
            self._done = done if self._total is None else min(done, self._total)
            if self._error is not None:
                return
            try:
                self._track(Progress(self._phase, self._done, self._total, "bytes", {"name": self._name}))
            except BaseException as error:
                self._error = error

    def finish(self) -> None:
        """Raise the exception of the callback, if there was one."""
        if self._error is not None:
            raise self._error


@contextmanager
def download_followed(name: str, total: int | None) -> Iterator[dict[str, Any]]:
    """Arguments for `snapshot_download` that report its bytes; none if nobody follows the command."""
    if not is_followed():
        yield {}
        return
    transfer = Transfer("fetch", total, name)
    yield {"tqdm_class": _bar_of(transfer)}
    transfer.finish()


def follow_files(name: str, sizes: Mapping[str, int], download: Callable[..., object]) -> None:
    """Call `download` with each file, and with arguments for `hf_hub_download` that report its bytes."""
    transfer = Transfer("fetch", sum(sizes.values()), name)
    done = 0
    for file, size in sizes.items():
        download(file, tqdm_class=_bar_of(transfer, done))
        done += size
        transfer.advance_to(done)
    transfer.finish()


def _bar_of(transfer: Transfer, before: int = 0) -> type:
    """A bar that draws nothing and reports the bytes that huggingface_hub counts, after those `before`.

    There are several for one download: of files, of bytes received and of bytes written. The last two are
    about equal, and the larger one counts.
    """
    from tqdm.auto import tqdm

    most = [0]

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **named: Any) -> None:
            self.counts_bytes = named.get("unit") == "B"
            named.pop("name", None)
            super().__init__(*args, **{**named, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes and self.n > most[0]:
                most[0] = int(self.n)
                transfer.advance_to(before + most[0])

    return Bar


@contextmanager
def upload_followed(name: str, total: int) -> Iterator[Count]:
    """A function that makes huggingface_hub's operations report the bytes that are sent for them."""
    if not is_followed():
        yield lambda operation: operation
        return
    transfer = Transfer("upload", total, name)

    def count(operation: Any) -> Any:
        if isinstance(getattr(operation, "path_or_fileobj", None), str | Path):
            vars(operation)["as_file"] = _counting(operation.as_file, transfer)
        return operation

    with _xet_followed(transfer):
        yield count
    transfer.advance_to(total)
    transfer.finish()


def _counting(as_file: Callable[[], Any], transfer: Transfer) -> Callable[..., Any]:
    """In place of `CommitOperationAdd.as_file`: counts the bytes that are read to be sent."""

    @contextmanager
    def counting(with_tqdm: bool = False) -> Iterator[BinaryIO]:
        with as_file() as stream:
            read: Callable[..., bytes] = stream.read

            def count(*size: int) -> bytes:
                data = read(*size)
                transfer.add(len(data))
                return data

            if with_tqdm:  # else the file is read for its checksum
                stream.read = count
            yield stream

    return counting


@contextmanager
def _xet_followed(transfer: Transfer) -> Iterator[None]:
    """Report the bytes that huggingface_hub uploads through Xet, for which it has no public callback.

    If its private names have changed, nothing is reported of such uploads.
    """
    try:
        from huggingface_hub import utils
        from huggingface_hub.utils import _xet_progress_reporting as reporting

        found: dict[str, Any] = {
            "XetUploadProgressReporter": (reporting, reporting.XetUploadProgressReporter),
            "are_progress_bars_disabled": (utils, utils.are_progress_bars_disabled),
        }
    except (ImportError, AttributeError):
        yield
        return

    class Reporter:
        def update_progress(self, group_report: Any, *_: Any) -> None:
            transfer.advance_to(int(group_report.total_bytes_completed))

        def close(self, *_: Any) -> None:
            return None

    replacements = {
        "XetUploadProgressReporter": Reporter,
        "are_progress_bars_disabled": lambda name=None: False,
    }
    for name, (module, _) in found.items():
        setattr(module, name, replacements[name])
    try:
        yield
    finally:
        for name, (module, before) in found.items():
            setattr(module, name, before)


@contextmanager
def hub_bars_restored() -> Iterator[None]:
    """Leave huggingface_hub's setting of its own bars as it was, whatever changes it meanwhile."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    were_disabled = are_progress_bars_disabled()
    try:
        yield
    finally:
        if were_disabled:
            disable_progress_bars()
