"""What a run measures, written down as it comes."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from svdconvert.training.logs.drift import DriftLog
from svdconvert.training.logs.metrics_file import METRICS, SAMPLES, MetricsFile
from svdconvert.training.logs.samples import Samples
from svdconvert.training.logs.trackers import Trackers
from svdconvert.training.optim.checkpoints import Checkpoints
from svdconvert.training.optim.loop import EvalLog, StepLog

Log = StepLog | EvalLog | DriftLog


def record(
    logs: Iterator[Log], directory: Path, checkpoints: Checkpoints, samples: Samples, trackers: Trackers
) -> Iterator[Log]:
    """Pass the logs on, each written first: a line a log, and the model's answers at every measurement."""
    begin, leads = checkpoints.step, checkpoints.leads
    with (
        MetricsFile(directory / METRICS, begin, leads=leads) as metrics,
        MetricsFile(directory / SAMPLES, begin, leads=leads and bool(samples.prompts)) as answers,
        trackers,
    ):
        for log in logs:
            values = _values(log)
            metrics.write(values)
            trackers.log(log.step, {name: value for name, value in values.items() if name != "step"})
            if isinstance(log, EvalLog):
                for answer in samples.answers():
                    answers.write({"step": log.step, **answer})
            if checkpoints.due(log.step):
                metrics.sync()
                answers.sync()
            yield log


def _values(log: Log) -> dict[str, Any]:
    """What was measured by name, the scores among the rest."""
    values = {name: value for name, value in asdict(log).items() if value is not None}
    scores: dict[str, float] = values.pop("scores", {})
    return values | scores
