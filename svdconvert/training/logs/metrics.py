"""The measurements of a run as they are made: metrics.jsonl, samples.jsonl and trackers."""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from svdconvert.manifest.training import METRICS, SAMPLES
from svdconvert.output.measurements import read_measurements
from svdconvert.training.logs.drift import DriftLog
from svdconvert.training.logs.samples import Samples
from svdconvert.training.logs.trackers import Trackers
from svdconvert.training.optim.loop import EvalLog, StepLog

Log = StepLog | EvalLog | DriftLog


class JsonLinesFile:
    """A file with one JSON object per line, each with its step; a context manager."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Open `path` and keep its lines up to `resumed_step`, because later steps are repeated.

        Raises ArtifactError if one of them is damaged.
        """
        self._path = path
        before = read_measurements(path) if resumed_step and path.is_file() else []
        kept = [line for line, values in before if values["step"] <= resumed_step]
        path.write_bytes(b"".join(kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line."""
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Make sure that all lines are on the disk."""
        if self._path.is_file():
            os.fsync(self._stream.fileno())

    def __enter__(self) -> "JsonLinesFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


class MetricsLog:
    """Everything that records measurements of one run; a context manager.

    Processes other than the leading one write no files.
    """

    def __init__(
        self, directory: Path, resumed_step: int, samples: Samples, trackers: Trackers, *, leads: bool
    ) -> None:
        """Open the files in `directory`; with `resumed_step` > 0 their lines up to that step are kept."""
        self._samples = samples
        self._trackers = trackers
        null = Path(os.devnull)
        writes_samples = leads and bool(samples.prompts)
        self._metrics_file = JsonLinesFile(directory / METRICS if leads else null, resumed_step)
        self._samples_file = JsonLinesFile(directory / SAMPLES if writes_samples else null, resumed_step)
        self._open = ExitStack()

    def write(self, log: Log) -> None:
        """Record one measurement; after an evaluation also the model's answers to the sample prompts."""
        values = _values(log)
        self._metrics_file.write(values)
        self._trackers.log(log.step, {name: value for name, value in values.items() if name != "step"})
        if isinstance(log, EvalLog):
            for answer in self._samples.answers():
                self._samples_file.write({"step": log.step, **answer})

    def sync(self) -> None:
        """Make sure that everything recorded so far is on the disk."""
        self._metrics_file.sync()
        self._samples_file.sync()

    def __enter__(self) -> "MetricsLog":
        for part in (self._metrics_file, self._samples_file, self._trackers):
            self._open.enter_context(part)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()


def _values(log: Log) -> dict[str, Any]:
    """The entries of a line: all fields that are not None, with the scores as separate entries.

    The speed is left out: a line is the same in every run.
    """
    known = asdict(log).items()
    values = {name: value for name, value in known if value is not None and name != "speed"}
    scores: dict[str, float] = values.pop("scores", {})
    return values | scores
