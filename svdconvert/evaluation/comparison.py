"""Compare the results of several directories, row by row: no model is loaded, and nothing is written.

Two shares of correct answers on the same questions are compared by the questions on which they differ
(pairs.py), which tells apart smaller differences than their intervals do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from svdconvert.checkpoint.json_text import parse_json
from svdconvert.errors import ArtifactError, did_you_mean
from svdconvert.evaluation.pairs import mcnemar, paired_interval
from svdconvert.manifest.claims import require_answers
from svdconvert.manifest.evaluations import (
    FOLDER,
    EvaluationResult,
    PublishedScore,
    read_evaluation,
)

_LONGEST_LINE = 1 << 24
_MOST_ROWS = 10_000_000


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class PairedTest(_Part):
    """One directory against the first, on the rows that both answered."""

    rows: int
    both: int
    """Rows that both answered correctly."""
    only_first: int
    """Rows that the first directory alone answered correctly."""
    only_this: int
    difference: float
    """Share of correct answers minus that of the first directory, on these rows."""
    interval: tuple[float, float]
    """Of the difference, 95 %."""
    p: float
    """Of the exact McNemar test, two-sided: how often equal models would differ as much."""
    left_out: int
    """Rows that only one of the two answered."""


class ComparedResult(_Part):
    """The result of one directory for one task."""

    directory: str
    method: str | None
    rank: int | None
    n: int
    correct: int
    score: float
    interval: tuple[float, float]
    headline: str
    headline_score: float
    against_first: PairedTest | None
    """None for the first directory."""
    published: tuple[PublishedScore, ...]


class ComparedTask(_Part):
    """One task under one protocol."""

    task: str
    protocol: str
    results: tuple[ComparedResult, ...]


class Comparison(_Part):
    """Several directories, task by task."""

    tasks: tuple[ComparedTask, ...]


@dataclass(frozen=True)
class _Graded:
    """A result with what its answers are worth: row id -> (checksum of the question, correct)."""

    path: Path
    result: EvaluationResult
    rows: Mapping[str, tuple[str, bool]]


def compare_evaluations(
    directories: Sequence[str | Path], tasks: Sequence[str] = (), protocol: str = "strict"
) -> Comparison:
    """Compare results, the first directory's with each of the others'.

    `directories` have been evaluated (their results are in DIR/evaluations), or hold results themselves;
    `tasks` are by default all that every directory has. Raises ArtifactError if fewer than two directories
    are given, a directory has no result of a task, or the results are for other data or another version.
    """
    folders = [_folder(Path(directory)) for directory in directories]
    if len(folders) < 2:
        raise ArtifactError("a comparison needs two directories or more; give those that were evaluated")
    names = _common_tasks(folders, tasks)
    return Comparison(tasks=tuple(_compare_task(folders, name, protocol) for name in names))


def _folder(directory: Path) -> Path:
    own = directory / FOLDER
    if own.is_dir():
        return own
    if directory.is_dir() and any(directory.glob("*.json")) and any(directory.glob("*.jsonl")):
        return directory
    raise ArtifactError(
        f"{directory} has no results; evaluate it first: svdconvert eval {directory} --tasks ..."
    )


def _tasks_in(folder: Path) -> set[str]:
    return {
        path.stem.replace("--", ":") for path in folder.glob("*.jsonl") if path.with_suffix(".json").is_file()
    }


def _common_tasks(folders: Sequence[Path], wanted: Sequence[str]) -> list[str]:
    found = [_tasks_in(folder) for folder in folders]
    if not wanted:
        common = set.intersection(*found)
        if not common:
            lists = "; ".join(
                f"{folder} has {', '.join(sorted(names)) or 'none'}"
                for folder, names in zip(folders, found, strict=True)
            )
            raise ArtifactError(f"there is no task of which all have a result: {lists}")
        return sorted(common)
    for folder, names in zip(folders, found, strict=True):
        for task in wanted:
            if task not in names:
                raise ArtifactError(f"{folder} has no result of {task}; {did_you_mean(task, names)}")
    return list(dict.fromkeys(wanted))


def _compare_task(folders: Sequence[Path], task: str, protocol: str) -> ComparedTask:
    graded = [_read(folder, task, protocol) for folder in folders]
    first = graded[0]
    results = [_compared(first, protocol, None)]
    for other in graded[1:]:
        _refuse_other_data(first, other)
        results.append(_compared(other, protocol, _paired(first, other)))
    return ComparedTask(task=task, protocol=protocol, results=tuple(results))


def _compared(graded: _Graded, protocol: str, test: PairedTest | None) -> ComparedResult:
    result = graded.result
    grades = {str(name): count for name, count in result.grades.items()}
    count = grades[protocol]
    folder = graded.path.parent
    return ComparedResult(
        directory=str(folder.parent if folder.name == FOLDER else folder),
        method=result.model.method,
        rank=result.model.rank,
        n=count.n,
        correct=count.correct,
        score=count.score,
        interval=count.interval,
        headline=result.headline,
        headline_score=result.score,
        against_first=test,
        published=result.published,
    )


def _read(folder: Path, task: str, protocol: str) -> _Graded:
    path = folder / f"{task.replace(':', '--')}.json"
    result = read_evaluation(path)
    if protocol not in result.grades:
        raise ArtifactError(f"{path} has no grade {protocol!r}; {did_you_mean(protocol, result.grades)}")
    rows = _read_rows(path.with_suffix(".jsonl"), protocol)
    require_answers(result, path)
    return _Graded(path, result, rows)


def _read_rows(path: Path, protocol: str) -> dict[str, tuple[str, bool]]:
    """id -> (checksum of prompt, gold and extra; correct). Raises ArtifactError if a line is damaged."""
    rows: dict[str, tuple[str, bool]] = {}
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(_LONGEST_LINE + 1):
            number += 1
            try:
                row = parse_json(line)
                key = str(row["id"])
                asked = repr((row["prompt"], row["gold"], row.get("extra")))
                correct = row[protocol]["correct"]
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{path}: line {number} is damaged; evaluate again") from error
            if not isinstance(correct, bool) or key in rows or number > _MOST_ROWS:
                raise ArtifactError(f"{path}: line {number} is damaged; evaluate again")
            rows[key] = (sha256(asked.encode("utf-8", "surrogatepass")).hexdigest(), correct)
    return rows


def _refuse_other_data(first: _Graded, other: _Graded) -> None:
    one = first.result
    two = other.result
    if one.version != two.version:
        raise ArtifactError(
            f"{other.path} is of version {two.version} of {two.task}, and {first.path} of version "
            f"{one.version}: evaluate both with the same svdconvert"
        )
    if one.data.sha256 == two.data.sha256:
        return
    for field in ("name", "config", "split", "revision"):
        has = getattr(two.data, field)
        expected = getattr(one.data, field)
        if has != expected:
            raise ArtifactError(
                f"{other.path} is for the data {field} {has}, and {first.path} for {expected}: evaluate both "
                "on the same data"
            )


def _paired(first: _Graded, other: _Graded) -> PairedTest:
    same = [
        key for key, (asked, _) in first.rows.items() if key in other.rows and other.rows[key][0] == asked
    ]
    if not same:
        raise ArtifactError(
            f"{first.path} and {other.path} have no row in common: evaluate both on the same data"
        )
    outcomes = [(first.rows[key][1], other.rows[key][1]) for key in same]
    only_first = sum(one and not two for one, two in outcomes)
    only_this = sum(two and not one for one, two in outcomes)
    return PairedTest(
        rows=len(same),
        both=sum(one and two for one, two in outcomes),
        only_first=only_first,
        only_this=only_this,
        difference=(only_this - only_first) / len(same),
        interval=paired_interval(only_first, only_this, len(same)),
        p=mcnemar(only_first, only_this),
        left_out=len({*first.rows, *other.rows}) - len(same),
    )
