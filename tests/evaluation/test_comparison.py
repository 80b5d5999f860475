"""Comparing results that were written before: same rows only, and nothing else than the same."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from svdconvert.errors import ArtifactError
from svdconvert.evaluation.comparison import compare_evaluations
from svdconvert.evaluation.pairs import mcnemar
from svdconvert.evaluation.published import published_rows
from tests.evaluated import graded

Outcomes = Mapping[str, bool]


def write(folder: Path, outcomes: Outcomes, **changes: Any) -> Path:
    """A directory with a result of gsm8k; `changes` are of its fields, dots in names as two underscores."""
    count = len(outcomes)
    correct = sum(outcomes.values())
    grade = graded(correct, 0, count)
    result: dict[str, Any] = {
        "format": 1,
        "task": "gsm8k",
        "version": 1,
        "data": {"name": "openai/gsm8k", "config": "main", "split": "test", "sha256": "a", "rows": count},
        "model": {"kind": "trained", "fingerprint": "f", "name": folder.name, "method": "pissa", "rank": 8},
        "grades": {"strict": grade, "paper": grade},
        "metrics": {"accuracy": correct / count},
        "headline": "accuracy",
        "seconds": 1.0,
        "tokens": 10,
    }
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (result[part] if part else result)[key] = value
    place = folder / "evaluations"
    place.mkdir(parents=True)
    name = result["task"].replace(":", "--")
    (place / f"{name}.json").write_text(json.dumps(result))
    (place / f"{name}.jsonl").write_text("".join(line(row, correct) for row, correct in outcomes.items()))
    return folder


def line(row: str, correct: bool) -> str:
    grade = {"correct": correct, "answered": True, "extracted": None}
    asked = {"id": row, "prompt": f"question {row}", "gold": "1", "extra": {}, "answer": "1", "tokens": 1}
    return json.dumps({**asked, "end": "end", "strict": grade, "paper": grade}) + "\n"


def outcomes(pattern: str, first: int = 0) -> Outcomes:
    return {str(first + number): mark == "1" for number, mark in enumerate(pattern)}


def test_two_directories_are_paired_row_by_row(tmp_path: Path) -> None:
    first = write(tmp_path / "a", outcomes("1111000011"))
    second = write(tmp_path / "b", outcomes("1100111011"))
    (task,) = compare_evaluations([first, second]).tasks
    one, two = task.results
    assert one.against_first is None and (one.n, one.correct) == (10, 6)
    test = two.against_first
    assert test is not None
    assert (test.rows, test.both, test.only_first, test.only_this, test.left_out) == (10, 4, 2, 3, 0)
    assert test.difference == pytest.approx(0.1) and test.p == mcnemar(2, 3)


def test_only_rows_with_the_same_question_are_paired(tmp_path: Path) -> None:
    first = write(tmp_path / "a", outcomes("11110"))
    second = write(tmp_path / "b", outcomes("10101", first=2), data__sha256="b", data__limit=5)
    answers = second / "evaluations" / "gsm8k.jsonl"
    answers.write_text(answers.read_text().replace("question 3", "another question"))
    (task,) = compare_evaluations([first, second]).tasks
    test = task.results[1].against_first
    assert test is not None and (test.rows, test.left_out) == (2, 5)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"data__sha256": "b", "data__name": "other/data"}, ["other/data", "openai/gsm8k"]),
        ({"data__sha256": "b", "data__split": "train"}, ["train", "test"]),
        ({"version": 2}, ["version 2", "version 1"]),
        ({"task": "math"}, ["gsm8k", "math"]),
    ],
)
def test_other_tasks_and_data_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], names: Sequence[str]
) -> None:
    first = write(tmp_path / "a", outcomes("10"))
    second = write(tmp_path / "b", outcomes("10"), **changes)
    with pytest.raises(ArtifactError) as caught:
        compare_evaluations([first, second])
    assert all(name in str(caught.value) for name in names)


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "a", outcomes("10"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="two directories"):
        compare_evaluations([first])
    with pytest.raises(ArtifactError, match="empty has no results"):
        compare_evaluations([first, tmp_path / "empty"])
    with pytest.raises(ArtifactError, match="no result of mth"):
        compare_evaluations([first, first], ["mth"])
    with pytest.raises(ArtifactError, match="no grade 'paper-pissa'"):
        compare_evaluations([first, first], protocol="paper-pissa")
    other = write(tmp_path / "b", outcomes("10", first=5), data__sha256="b")
    with pytest.raises(ArtifactError, match="no row in common"):
        compare_evaluations([first, other])
    answers = other / "evaluations" / "gsm8k.jsonl"
    for damage in (
        "{",
        '{"id": 1}\n',
        line("5", True) * 2,
        "[]\n",
        '{"id": 5, "prompt": 1, "gold": 1, "strict": 3}\n',
    ):
        answers.write_text(damage)
        with pytest.raises(ArtifactError, match="line . is damaged"):
            compare_evaluations([first, other])


def test_a_result_that_its_answers_do_not_give_is_not_compared(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", outcomes("10")), write(tmp_path / "b", outcomes("10"))
    answers = second / "evaluations" / "gsm8k.jsonl"
    answers.write_text(answers.read_text().replace("false", "true"))
    with pytest.raises(ArtifactError, match="strict: 2 correct in gsm8k.jsonl instead of 1"):
        compare_evaluations([first, second])


def test_a_directory_of_results_alone_can_be_compared(tmp_path: Path) -> None:
    first = write(tmp_path / "a", outcomes("10"))
    assert compare_evaluations([first / "evaluations", first]).tasks[0].results[1].n == 2


def test_published_scores_fit_model_method_rank_and_data() -> None:
    (row,) = published_rows("gsm8k", "meta-llama/Llama-2-7b-hf", "pissa", 128)
    assert row.score == 0.5322 and row.method == "pissa" and "2404.02948" in row.source
    (row,) = published_rows("gsm8k", "meta-llama/Llama-2-7b-hf", "pissa", 64, ["meta-math/MetaMathQA"])
    assert row.score == 0.582 and "395,000" in row.data
    assert published_rows("gsm8k", "meta-llama/Llama-2-7b-chat-hf", "pissa", 128) == []
    assert published_rows("gsm8k", "meta-llama/Llama-2-7b-hf", "pissa", 16) == []
    assert published_rows("gsm8k", "meta-llama/Llama-2-7b-hf", "pissa", 128, ["tatsu-lab/alpaca"]) == []
    assert published_rows("gsm8k", "meta-llama/Llama-2-7b-hf", None, None) == []
    assert published_rows("gsm8k", None, "pissa", 128) == []
    assert len(published_rows("math", "/models/Llama-2-7b-hf", "full", None)) == 2
    assert published_rows("mrpc", "microsoft/deberta-v3-base", "pissa", 8)[0].score == 0.915


def test_every_published_row_has_a_score_for_every_task() -> None:
    from svdconvert.evaluation.base import TASKS
    from svdconvert.evaluation.published import _published
    from svdconvert.methods.base import METHODS

    file = _published()
    for table in file.scores:
        assert set(table.tasks) <= set(TASKS.names()) | {"gsm8k"}
        for row in table.rows:
            assert len(row.scores) == len(table.tasks) and row.method in METHODS.names()
            assert row.model in file.models and all(0 < score < 100 for score in row.scores)


def test_a_comparison_is_printed_with_short_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from svdconvert.cli.evaluation_comparison import show_comparison

    first = write(tmp_path / "a", outcomes("1110"))
    second = write(tmp_path / "b", outcomes("10", first=1), data__sha256="b")
    show_comparison(compare_evaluations([first, second]))
    text = capsys.readouterr().out
    assert "gsm8k, graded strict" in text and "2 rows that" in text
    assert any(line.split()[:4] == ["b", "2", "1", "0"] for line in text.splitlines())
