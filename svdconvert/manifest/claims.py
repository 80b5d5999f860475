"""Recomputes what a stored evaluation claims: whose it is, and whether its grades follow from its answers."""

from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.json_text import parse_json
from svdconvert.errors import ArtifactError, SvdConvertError
from svdconvert.manifest.evaluations import (
    EvaluationResult,
    manifest_fingerprint,
    read_evaluation,
    result_paths,
)
from svdconvert.manifest.schema import Manifest


def evaluation_faults(directory: Path, manifest: Manifest) -> Iterator[str]:
    """One sentence for each stored result, or claim of one, that does not hold for this directory."""
    fingerprint = manifest_fingerprint(manifest)
    for path in result_paths(directory):
        try:
            result = read_evaluation(path)
        except SvdConvertError as error:
            yield str(error)
            continue
        yield from (
            f"{path} {fault}" for fault in result_faults(result, path.with_suffix(".jsonl"), fingerprint)
        )


def require_answers(result: EvaluationResult, path: Path) -> None:
    """Raise ArtifactError if the grades of the result at `path` do not follow from the answers next to it."""
    answers = path.with_suffix(".jsonl")
    if fault := next(result_faults(result, answers, result.model.fingerprint), None):
        raise ArtifactError(f"{path} {fault}; evaluate again, or remove the result")


def result_faults(result: EvaluationResult, answers: Path, fingerprint: str) -> Iterator[str]:
    """One sentence for each claim of a result that does not hold.

    `answers` is the file of its answers, `fingerprint` that of the directory.
    """
    if result.model.fingerprint != fingerprint:
        yield "belongs to other weights: evaluate again"
    if not answers.is_file():
        yield f"has no answers: {answers.name} is missing"
        return
    stored = _read_answers(answers)
    if stored is None:
        yield f"{answers.name} is no file of answers"
        return
    for protocol, count in result.grades.items():
        if (found := _counted(stored, protocol)) != (claimed := (count.n, count.correct, count.unanswered)):
            names = ("answers", "correct", "unanswered")
            wrong = next(at for at in range(3) if found[at] != claimed[at])
            yield f"{protocol}: {found[wrong]} {names[wrong]} in {answers.name} instead of {claimed[wrong]}"


def _read_answers(path: Path) -> list[Mapping[str, Any]] | None:
    """The stored answers; None if a line is not one."""
    found: list[Mapping[str, Any]] = []
    for line in BytesIO(path.read_bytes()):
        try:
            values = parse_json(line)
        except ValueError:
            return None
        if not isinstance(values, dict):
            return None
        if "answer" in values:
            found.append(values)
    return found


def _counted(answers: list[Mapping[str, Any]], protocol: str) -> tuple[int, int, int]:
    """(answers with this grade, correct, unanswered)."""
    grades = [grade for one in answers if isinstance(grade := one.get(protocol), dict)]
    correct = sum(grade.get("correct") is True for grade in grades)
    return len(grades), correct, sum(grade.get("answered") is False for grade in grades)
