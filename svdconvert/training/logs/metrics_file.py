"""metrics.jsonl and samples.jsonl: a line whenever something is measured."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class MetricsFile:
    """A file of JSON lines, each with its step, of a run that may go on after a kill; a context manager."""

    def __init__(self, path: Path, step: int, *, leads: bool = True) -> None:
        """Keep the lines up to `step`; what a killed run measured behind its last checkpoint comes again."""
        self._path = path if leads else Path(os.devnull)
        kept = [line for line in _lines(self._path) if step and json.loads(line)["step"] <= step]
        self._stream = self._path.open("w", encoding="utf-8")
        self._stream.writelines(kept)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Put what is written on the disk itself."""
        if self._path.is_file():
            os.fsync(self._stream.fileno())

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def _lines(path: Path) -> list[str]:
    """Whole lines: a kill may have cut the last."""
    if not path.is_file():
        return []
    return [
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
