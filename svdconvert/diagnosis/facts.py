"""A fact about this machine or installation, for `doctor`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of a diagnosis."""

    section: str
    """program, packages, extras, machine or hub."""
    name: str
    value: str
    """What is there; for what is missing, what to do."""
    state: Literal["ok", "note", "missing"] = "ok"
    """missing: the program cannot work without it; note: something works worse, or not at all."""
