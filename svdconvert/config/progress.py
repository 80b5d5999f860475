"""How far a long run is: told by the library, drawn by the console."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One finished tensor. Sizes in bytes of output."""

    name: str
    file: str
    done: int
    total: int


Track = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The tracker that draws nothing."""
