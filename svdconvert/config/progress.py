"""The progress of a long run: reported by the library, drawn by the command line."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One finished tensor; `done` and `total` are bytes of the output."""

    name: str
    file: str
    done: int
    total: int


Track = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The default of `Run.track`: discard the report."""
