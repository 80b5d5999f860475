"""What a fuzz target is: a reader of input that anybody may have written, and how its inputs are changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.mutate import Mutator, change_json

Reader = Callable[[bytes, Path], None]
"""Reads an input with an empty directory to use. Raises SvdConvertError if svdconvert refuses it, and
AssertionError if it is read in another way than the reference reads it."""


@dataclass(frozen=True)
class Target:
    """One parser, with everything that follows from what it has read."""

    read: Reader
    change: Mutator = change_json
    share: int = 10
    """Its part of all inputs, relative to other targets': less for slow ones."""
    seeds: Sequence[bytes] = ()
    """Inputs to begin from, in addition to the files in tests/data/fuzz/<target>."""


def content_of(change: Mutator) -> Mutator:
    """A mutator for inputs whose first line is the name of a file: only the file's content is changed."""

    def changed(chance: Random, raw: bytes) -> bytes:
        name, _, content = raw.partition(b"\n")
        return name + b"\n" + change(chance, content)

    return changed


def put(raw: bytes, directory: Path) -> Path:
    """Write an input whose first line is the name of a file to that file in `directory`."""
    name, _, content = raw.partition(b"\n")
    path = directory / name.decode()
    path.write_bytes(content)
    return path
