"""What a run led to, read from the files that its steps wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdconvert.config.experiment import FOLDERS
from svdconvert.manifest.evaluations import EvaluationResult, read_evaluations
from svdconvert.manifest.schema import Manifest, has_manifest, read_manifest
from svdconvert.manifest.training import METRICS, Measurements, read_series
from svdconvert.workflow.plan import Experiment, Plan
from svdconvert.workflow.record import results_directory

BASE_RUN = "base"
"""The name of the untouched model in the results."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The strict score of one task."""

    of: str
    """The directory that was asked: trained, merged, lora, decomposed or base."""
    task: str
    n: int
    correct: int
    score: float
    """correct / n."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of the score."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run, or the untouched model."""

    run: str
    variant: str
    seed: int | None = None
    method: str | None = None
    rank: int | None = None
    lr: float | None = None
    steps: int | None = None
    loss: tuple[float, float] | None = None
    """Of the first and of the last training step."""
    held_out: tuple[float, float] | None = None
    """Loss of the held-out rows before and after; with keep_best the lowest one."""
    scores: Sequence[Score] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Directory -> bytes of the weights in it, without those of the initial adapter."""


def outcomes(experiment: Experiment, out: Path) -> list[Outcome]:
    """The untouched model, if it was asked, and every run. Raises ArtifactError if a file is damaged."""
    found = [_outcome(plan) for plan in experiment.plans]
    if experiment.asks_base:
        scores = tuple(_score(BASE_RUN, result) for result in read_evaluations(results_directory(out)))
        found.insert(0, Outcome(run=BASE_RUN, variant=BASE_RUN, scores=scores))
    return found


def _outcome(plan: Plan) -> Outcome:
    folders = [FOLDERS[step] for step in plan.steps if step in FOLDERS]
    trained = plan.path("trained")
    series = read_series(trained / METRICS)
    made = read_manifest(trained).options if has_manifest(trained) else {}
    is_full = "trained" in folders and read_manifest(trained).kind == "finetuned"
    return Outcome(
        run=plan.name,
        variant=plan.variant.group or plan.name,
        seed=plan.variant.seed,
        method=plan.split.method,
        rank=None if is_full else plan.split.rank,
        lr=made.get("lr"),
        steps=len(series.of("loss")) or None,
        loss=_ends(series, "loss", lowest=False),
        held_out=_ends(series, "eval_loss", lowest=bool(made.get("keep_best"))),
        scores=tuple(
            _score(folder, result) for folder in plan.asked for result in read_evaluations(plan.path(folder))
        ),
        sizes={folder: _weights(plan.path(folder)) for folder in folders},
    )


def _ends(series: Measurements, name: str, *, lowest: bool) -> tuple[float, float] | None:
    values = [value for _, value in series.of(name)]
    return (values[0], min(values) if lowest else values[-1]) if values else None


def _score(of: str, result: EvaluationResult) -> Score:
    strict = result.grades["strict"]
    return Score(
        of=of,
        task=result.task,
        n=strict.n,
        correct=strict.correct,
        score=strict.score,
        interval=strict.interval,
        metrics=dict(result.metrics),
    )


def _weights(directory: Path) -> int:
    manifest: Manifest = read_manifest(directory)
    files = [*manifest.files_of("model"), *manifest.files_of("adapter")]
    return sum((directory / file).stat().st_size for file in files)


def curves_of(plan: Plan) -> dict[str, Sequence[tuple[int, float]]]:
    """Name of a measurement -> its (step, value): the held-out loss, and the scores of a classifier."""
    series: Mapping[str, Any] = read_series(plan.path("trained") / METRICS).series
    wanted = ("eval_loss", "accuracy", "f1", "matthews", "pearson")
    return {name: series[name] for name in wanted if series.get(name)}
