"""Checkpoints on disk, from which an interrupted training run is resumed.

Each checkpoint is one file. It is written under another name and then renamed, so that it is either complete
or absent.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from svdconvert.checkpoint.torch_files import load_tensors_only
from svdconvert.errors import CheckpointError
from svdconvert.output.pth_archive import torch_errors_as_os_error

FOLDER = "checkpoints"
"""The folder of the checkpoints in the output directory."""
_NAME = re.compile(r"step-(\d+)\.pt")


def do_nothing() -> None:
    """The default of `Checkpoints.before_save`."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in one folder."""

    folder: Path
    every: int
    """Steps between two checkpoints."""
    limit: int = 2
    """How many of the newest checkpoints are kept."""
    leads: bool = True
    """True in the only process that writes."""
    seconds: float | None = None
    """A checkpoint is also due when so much time has passed without one; None for the steps alone."""
    before_save: Callable[[], None] = do_nothing
    """Called in the process that writes, before each checkpoint."""

    @property
    def step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        files = self._files()
        return files[-1][0] if files else 0

    def load_newest(self) -> dict[str, Any] | None:
        """The state in the newest checkpoint, None without one. Raises CheckpointError if it is damaged."""
        files = self._files()
        if not files:
            return None
        file = files[-1][1]
        state = load_tensors_only(file)
        if not isinstance(state, dict):
            raise CheckpointError(f"{file} holds no state of a training run; remove it to use an older one")
        return state

    def is_due(self, step: int, waited: float = 0.0) -> bool:
        """True if a checkpoint is to be saved after this step, `waited` seconds after the one before."""
        return step % self.every == 0 or (self.seconds is not None and waited >= self.seconds)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step`, and delete all but the newest checkpoints."""
        if not self.leads:
            return
        self.before_save()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08}.pt"
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as stream:
            with torch_errors_as_os_error(unfinished):
                torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.rename(path)
        for _, old in self._files()[: -self.limit]:
            old.unlink()

    def delete(self) -> None:
        """Delete the folder with all checkpoints.

        Raises OSError if that fails, because what is left would become a part of the output.
        """
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _files(self) -> list[tuple[int, Path]]:
        """(step, file), the newest last, without files that a crash of the machine truncated."""
        matches = ((path, _NAME.fullmatch(path.name)) for path in self.folder.glob("step-*.pt"))
        return sorted((int(match[1]), path) for path, match in matches if match and is_zipfile(path))
