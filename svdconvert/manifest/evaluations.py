"""The results of `eval`: DIR/evaluations/<task>.json, one file for each task, with the answers next to it.

They are no part of the manifest: a directory may be evaluated at any time after it was written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from math import isclose
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from svdconvert.config.display import Shown
from svdconvert.errors import ArtifactError
from svdconvert.manifest.fingerprint import digest
from svdconvert.manifest.intervals import standard_error, wilson_interval
from svdconvert.manifest.schema import Manifest
from svdconvert.output.ownership import EVALUATIONS
from svdconvert.output.sidecars import read_json_object

FOLDER = EVALUATIONS
"""The subdirectory of the results."""
FORMAT = 1
_SHARES = ("accuracy", "pass@1")
"""The metrics that are the share of correct answers."""
_AGAIN = "remove the file and evaluate again"
MOST_RESULTS = 1000
"""Results that are read from one directory."""

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class EvaluatedData(_Part):
    """The rows that were asked."""

    name: str
    """ORG/NAME on the Hub, or the name of a file without its directory."""
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    sha256: str
    """Of the records that were asked, as JSON lines with sorted keys."""
    rows: Count
    limit: Count | None = None


class EvaluatedModel(_Part):
    """The model that answered."""

    kind: str
    """The kind of the directory in its manifest; "plain" or "adapter" without a manifest."""
    fingerprint: str
    """Of the weights and the adapter: see `manifest_fingerprint` for a directory with a manifest."""
    name: str
    """org/name on the Hub, or the name of the directory."""
    method: str | None = None
    rank: Count | None = None
    weights: Literal["own", "base", "residual"] = "own"
    """Whose weights its adapter was used with, if it is one."""
    prompts: str = ""
    """Checksum of the prompts as its tokenizer encodes them."""


class GradeCount(_Part):
    """All answers under one protocol."""

    n: Count
    correct: Count
    unanswered: Count
    """Answers that hold nothing that could be right or wrong; they count as wrong."""
    cut: Count
    """Answers that the limit of new tokens ended."""
    score: Fraction
    """correct / n."""
    standard_error: Number
    interval: tuple[Fraction, Fraction]
    """Wilson's 95 % interval of the score."""


class PublishedScore(_Part):
    """A published number with which a result can be compared."""

    score: Fraction
    model: str
    method: str
    rank: Count | None = None
    data: str
    source: str


class EvaluationResult(Shown, _Part):
    """The content of one file. Scores are fractions from 0 to 1."""

    format: Literal[1] = 1
    task: str
    version: Count
    data: EvaluatedData
    model: EvaluatedModel
    options: Mapping[str, Any] = {}
    """Everything else that shapes the answers: element type, batch size, limits, stop strings."""
    grades: Mapping[Literal["strict", "paper", "paper-pissa"], GradeCount]
    metrics: Mapping[str, Number]
    headline: str
    """The key of `metrics` that stands for the task."""
    seconds: Number
    """Time spent on answering, over all runs."""
    tokens: Count
    """Tokens that the model wrote."""
    sandbox: tuple[str, ...] = ()
    """The layers that confined generated code; empty if none was run."""
    published: tuple[PublishedScore, ...] = ()
    versions: Mapping[str, str] = {}

    def shown_as(self) -> Mapping[str, object]:
        """Task, score and interval, and how many rows were asked."""
        strict = self.grades.get("strict")
        return {
            "task": self.task,
            self.headline: round(self.metrics.get(self.headline, 0.0), 4),
            "interval": tuple(round(end, 4) for end in strict.interval) if strict else None,
            "correct": strict.correct if strict else None,
            "rows": self.data.rows,
            "limit": self.data.limit,
            "model": self.model.name,
        }

    @property
    def score(self) -> float:
        """The headline's value."""
        return self.metrics[self.headline]


def result_name(task: str) -> str:
    """The name of a task's files, without their endings: harness:piqa is harness--piqa."""
    return task.replace(":", "--")


def manifest_fingerprint(manifest: Manifest) -> str:
    """Identifies the model of a directory: its own tensors, its base and its residual.

    A result in the directory belongs to it if this is the result's `model.fingerprint`.
    """
    origins = [manifest.base, manifest.residual]
    known = [asdict(origin.fingerprint) if origin else None for origin in origins]
    return digest([{file: dict(sums) for file, sums in manifest.files.items()}, known])


def read_evaluations(directory: str | Path) -> list[EvaluationResult]:
    """The results in DIR/evaluations, sorted by task; empty if there are none.

    Raises ArtifactError if a file is damaged or of an unknown format.
    """
    return [read_evaluation(path) for path in result_paths(Path(directory))]


def result_paths(directory: Path) -> list[Path]:
    """The files of the results in DIR/evaluations, sorted. Raises ArtifactError if there are too many."""
    paths = sorted((directory / FOLDER).glob("*.json"))
    if len(paths) > MOST_RESULTS:
        raise ArtifactError(f"{directory / FOLDER} holds more than {MOST_RESULTS} results; remove some")
    return paths


def read_evaluation(path: Path) -> EvaluationResult:
    """One result. Raises ArtifactError if the file is damaged or of an unknown format."""
    values = read_json_object(path)
    if values.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {values.get('format')!r}, and this svdconvert reads format {FORMAT}; use the "
            f"version that wrote it, or {_AGAIN}"
        )
    try:
        result = EvaluationResult.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is damaged at {place}: {first['msg']}; {_AGAIN}") from error
    if result.headline not in result.metrics or result_name(result.task) != path.stem:
        raise ArtifactError(f"{path} is damaged: its task or its headline does not fit; {_AGAIN}")
    if fault := next(_grade_faults(result), None):
        raise ArtifactError(f"{path} is damaged: {fault}; {_AGAIN}")
    return result


def _grade_faults(result: EvaluationResult) -> Iterator[str]:
    """What in the grades contradicts itself."""
    for protocol, count in result.grades.items():
        yield from (f"{protocol}: {fault}" for fault in _count_faults(count))
    strict = result.grades.get("strict")
    if strict and result.headline in _SHARES and not _close(result.score, strict.score):
        yield f"its {result.headline} {result.score:.4g} is not its score {strict.score:.4g}"


def _count_faults(count: GradeCount) -> Iterator[str]:
    if count.correct + count.unanswered > count.n or count.cut > count.n:
        yield "more answers are counted than there are"
    elif not _close(count.score, count.correct / count.n if count.n else 0.0):
        yield f"score {count.score:.4g} instead of {count.correct} / {count.n}"
    elif not all(map(_close, count.interval, wilson_interval(count.correct, count.n))):
        yield "its interval is not that of its score"
    elif not _close(count.standard_error, standard_error(count.correct, count.n)):
        yield "its standard error is not that of its score"


def _close(one: float, other: float) -> bool:
    return isclose(one, other, abs_tol=5e-4)
