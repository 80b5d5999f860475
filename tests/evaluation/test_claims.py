"""verify compares a stored evaluation with the directory and with its own answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from svdconvert import inspect, verify
from svdconvert.manifest.intervals import wilson_interval
from tests.conftest import Build
from tests.evaluated import wilson, write_result
from tests.program import succeeded, svdconvert


@pytest.fixture
def directory(checkpoint: Build, decomposed: Build, tmp_path: Path) -> Path:
    """A DECOMPOSED directory with a result of three right answers and one wrong one."""
    copy = Path(shutil.copytree(decomposed(checkpoint("llama")), tmp_path / "pissa"))
    write_result(copy, [True, False, True, True])
    return copy


def test_a_result_that_follows_from_its_answers_passes(directory: Path) -> None:
    report = verify(directory)
    assert (report.faults, report.evaluations) == ([], 1)
    assert "1 compared with their answers" in succeeded("verify", directory).out


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        ("model.fingerprint", "0123", "other weights"),
        ("grades.strict.correct", 4, "score"),
        ("grades.strict.score", 0.8, "score"),
        ("grades.strict.interval", [0.7, 0.8], "interval"),
        ("grades.strict.standard_error", 0.01, "standard error"),
        ("grades.paper.unanswered", 0, "unanswered"),
        ("grades.paper.n", 1, "more answers"),
        ("grades.strict.cut", 5, "more answers"),
        ("headline", "f1", "damaged"),
        ("metrics.accuracy", 0.99, "is not its score"),
        ("tokens", -1, "damaged"),
    ],
)
def test_every_wrong_claim_is_a_fault(directory: Path, place: str, value: Any, word: str) -> None:
    path = directory / "evaluations" / "gsm8k.json"
    content = json.loads(path.read_text())
    *parents, last = place.split(".")
    inner = content
    for key in parents:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(content))
    faults = verify(directory).faults
    assert faults and all("gsm8k" in fault for fault in faults)
    assert any(word in fault for fault in faults), faults
    assert svdconvert("verify", directory).status == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda text: text.replace('"correct": true', '"correct": false', 1), "2 correct"),
        (lambda text: text.split("\n", 1)[1], "3 answers"),
        (lambda text: text + text.splitlines()[0] + "\n", "5 answers"),
        (lambda text: "{" + text, "no file of answers"),
        (lambda text: "[]\n" + text, "no file of answers"),
    ],
)
def test_answers_that_do_not_give_the_grades_are_a_fault(directory: Path, change: Any, word: str) -> None:
    answers = directory / "evaluations" / "gsm8k.jsonl"
    answers.write_text(change(answers.read_text()))
    assert any(word in fault for fault in verify(directory).faults), verify(directory).faults


def test_missing_answers_are_a_fault(directory: Path) -> None:
    (directory / "evaluations" / "gsm8k.jsonl").unlink()
    assert verify(directory).faults == [
        f"{directory / 'evaluations' / 'gsm8k.json'} has no answers: gsm8k.jsonl is missing"
    ]


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (3, 4), (0, 1319), (700, 1319), (1319, 1319)])
def test_the_interval_is_the_set_of_shares_that_the_count_does_not_contradict(correct: int, n: int) -> None:
    assert wilson_interval(correct, n) == pytest.approx(wilson(correct, n), abs=1e-9)


def test_inspect_lists_the_scores_with_their_intervals(directory: Path) -> None:
    path, _ = write_result(
        directory, [True, False], task="math", model={"kind": "x", "fingerprint": "0", "name": "y"}
    )
    found = inspect(directory).details["evaluations"]
    assert [one["task"] for one in found] == ["gsm8k", "math"]
    assert [one["of_these_weights"] for one in found] == [True, False]
    assert found[0]["interval"] == pytest.approx(wilson(3, 4))
    shown = " ".join(succeeded("inspect", directory).out.split())
    assert "gsm8k accuracy 75.0% (30.1% to 95.4%)" in shown
    assert "math accuracy 50.0%" in shown and "of other weights" in shown
