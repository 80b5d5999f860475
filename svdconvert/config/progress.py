"""The progress of a long run: reported by the library, shown by the command line or by a program.

What computes calls `report`; the callback that it reaches is the `track` of the running command's `Run`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

Fact = str | float

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a command is in one of its phases, which may alternate and repeat."""

    phase: str
    """What is being done, such as "fetch", "load weights", "decompose", "train", "held-out" or "upload"."""
    done: int
    total: int | None = None
    """None if it is not known."""
    unit: str = ""
    """What `done` and `total` count: bytes, tensors, rows, steps; empty if there is nothing to count."""
    facts: Mapping[str, Fact] = field(default_factory=dict)
    """What else is known: the "name" of a tensor, file or data set, and the "file" that it is written to; of
    a training step "loss", "held_out", "lr" and "tokens_per_second"."""


Track = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The default of `Run.track`: discard the report."""


_current: ContextVar[tuple[str, Track]] = ContextVar("progress", default=("", ignore_progress))
"""The name of the running command, and the callback that follows it."""


def report(phase: str | None, done: int, total: int | None = None, unit: str = "", **facts: Fact) -> None:
    """Tell the running command's `track` how far a phase is; None is the phase that has the command's name.

    An exception of the callback stops the command like any other failure.
    """
    command, track = _current.get()
    track(Progress(phase or command, done, total, unit, facts))


def current_track() -> Track:
    """The callback that follows the running command, for threads: these do not inherit it."""
    return _current.get()[1]


def is_followed() -> bool:
    """True if somebody follows the running command."""
    return current_track() is not ignore_progress


@contextmanager
def tracking(track: Track, command: str) -> Iterator[None]:
    """Send the reports of `command` to `track`; if that ignores them, to the callback that is already set."""
    followed = current_track() if track is ignore_progress else track
    token = _current.set((command, followed))
    try:
        yield
    finally:
        _current.reset(token)


def tracked(command: Callable[P, R]) -> Callable[P, R]:
    """Send the reports of a command to the `track` of its argument `run`."""
    parameters = signature(command)
    name = command.__name__.replace("_", "-")

    @wraps(command)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        run: Any = parameters.bind(*args, **kwargs).arguments.get("run")
        with tracking(run.track if run else ignore_progress, name):
            return command(*args, **kwargs)

    return call
