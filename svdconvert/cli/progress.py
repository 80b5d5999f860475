"""The only display of progress: one line on a terminal, else a line a minute in the log.

Both are on standard error; the libraries' own bars are off in the program, see `configure_libraries`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread
from time import monotonic

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from svdconvert.cli.progress_line import Meter, progress_text
from svdconvert.cli.terminal import leads, say, stderr
from svdconvert.config.progress import Progress, Track, ignore_progress, tracking

_PER_SECOND = 8  # times that a terminal's line is drawn
EVERY = 60.0
"""Seconds between two lines of a log."""


@contextmanager
def shown(command: str, log_every: int | None = None) -> Iterator[Track]:
    """Show the progress of everything until the context ends; yields the callback for `Run.track`.

    With `log_every` every so many steps of a training run leave a line, on a terminal too.
    """
    if not leads():
        yield ignore_progress
        return
    display = _Display(log_every)
    following = _on_terminal(display) if stderr.is_terminal else _in_log(display)
    with following, tracking(display.track, command):
        yield display.track


@contextmanager
def _on_terminal(display: "_Display") -> Iterator[None]:
    # What results are printed on standard output is not redirected; warnings of libraries go above the line.
    with Live(display, console=stderr, transient=True, refresh_per_second=_PER_SECOND, redirect_stdout=False):
        yield


@contextmanager
def _in_log(display: "_Display") -> Iterator[None]:
    """Write a line a minute from another thread, so that a phase that reports nothing is in the log too."""
    ended = Event()

    def write_lines() -> None:
        while not ended.wait(EVERY):
            say(display.text())

    writer = Thread(target=write_lines, daemon=True, name="log")
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


class _Display:
    """The newest report and the meters of all phases; several threads may report."""

    def __init__(self, log_every: int | None) -> None:
        self._log_every = log_every
        self._logged = 0
        self._latest = Progress("start", 0)
        self._meters = {"start": Meter(since=monotonic())}
        self._lock = Lock()

    def track(self, progress: Progress) -> None:
        """Show a report."""
        now = monotonic()
        with self._lock:
            if progress.phase != self._latest.phase:
                self._meters[self._latest.phase].pause(now)
            self._meters.setdefault(progress.phase, Meter()).advance(now, progress.done)
            self._latest = progress
        if self._is_logged(progress):
            self._logged = progress.done
            say(self.text())

    def _is_logged(self, progress: Progress) -> bool:
        if not self._log_every or "loss" not in progress.facts or progress.done <= self._logged:
            return False
        return progress.done % self._log_every == 0 or progress.done == progress.total

    def text(self, width: int | None = None) -> str:
        """The line as it is now."""
        with self._lock:
            meter = self._meters[self._latest.phase]
            return progress_text(self._latest, meter, monotonic(), width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text(options.max_width), no_wrap=True, overflow="crop")
