"""States of a training run on disk, from which it goes on after a kill.

A state is one file, written under another name first, so that it is there whole or not at all; the newest
few are kept.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

_NAME = re.compile(r"step-(\d+)\.pt")


def _silent(step: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Checkpoints:
    """The states in one folder."""

    folder: Path
    every: int
    """Steps from one state to the next."""
    keep: int = 2
    """How many of the newest are kept."""
    leads: bool = True
    """True in the one process that writes."""
    saved: Callable[[int], None] = field(default=_silent)
    """Told of the step of every state that is on the disk."""

    @property
    def step(self) -> int:
        """The step of the newest state, 0 where there is none."""
        files = self._files()
        return files[-1][0] if files else 0

    def newest(self) -> dict[str, Any] | None:
        """The newest state, None where there is none."""
        files = self._files()
        return torch.load(files[-1][1], map_location="cpu", weights_only=True) if files else None

    def due(self, step: int) -> bool:
        """True where a state is to be saved behind this step."""
        return step % self.every == 0

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state behind `step`, and forget those that are older than the newest few."""
        if not self.leads:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08}.pt"
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.rename(path)
        self.saved(step)
        for _, old in self._files()[: -self.keep]:
            old.unlink()

    def finish(self, *, keep: bool) -> None:
        """The run is at its end: remove all states, unless they are to be kept."""
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[tuple[int, Path]]:
        """(step, file), the newest last, without what the machine's end cut short."""
        named = ((path, _NAME.fullmatch(path.name)) for path in self.folder.glob("step-*.pt"))
        return sorted((int(found[1]), path) for path, found in named if found and is_zipfile(path))
