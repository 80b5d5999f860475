"""What a training run says at its end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from svdconvert.cli.training_summary import loss_curve, training_rows


def rows_of(tmp_path: Path, logs: list[dict[str, Any]], **options: Any) -> dict[str, object]:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    manifest: Any = SimpleNamespace(options={"lr": 2e-4, **options})
    return {name: value for name, value in training_rows(tmp_path, manifest).items() if value is not None}


def steps(count: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 4.0 - step / 100} for step in range(1, count + 1)]


EVALUATIONS = [
    {"step": 0, "eval_loss": 2.0, "accuracy": 0.5, "f1": 0.25, "matthews": 0.0},
    {"step": 4, "eval_loss": 1.25, "accuracy": 0.75, "f1": 0.625, "matthews": 0.5},
    {"step": 8, "eval_loss": 1.5, "accuracy": 0.625, "f1": 0.5, "matthews": 0.25},
]


def test_held_out_loss_and_scores_are_given_before_and_after(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [*steps(8), *EVALUATIONS])
    assert rows["held-out loss"] == "2.0000 before, 1.5000 after"
    assert rows["accuracy"] == "0.5000 before, 0.6250 after"
    assert rows["F1"] == "0.2500 before, 0.5000 after"
    assert rows["Matthews correlation"] == "0.0000 before, 0.2500 after"
    assert "weights of" not in rows


def test_with_keep_best_the_numbers_are_those_of_the_step_that_was_kept(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [*steps(8), *EVALUATIONS], keep_best=True)
    assert rows["weights of"] == "step 4, which has the lowest held-out loss"
    assert rows["held-out loss"] == "2.0000 before, 1.2500 after"
    assert rows["accuracy"] == "0.5000 before, 0.7500 after"


def test_a_run_out_of_patience_says_so(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [*steps(8), *EVALUATIONS], steps=20, patience=1)
    assert rows["steps"] == "8 of 20: 1 evaluations without a new lowest held-out loss"


def test_single_batches_are_never_compared(tmp_path: Path) -> None:
    assert rows_of(tmp_path, steps(8))["training loss"] == "3.9550 (mean of 8 steps)"
    few = rows_of(tmp_path, steps(100))["training loss"]
    assert few == "3.8950 in the first 20 steps, 3.0950 in the last 20 (means)"


@pytest.mark.parametrize(("encoding", "is_shown"), [("utf-8", True), ("ascii", False)])
def test_the_curve_is_shown_if_the_terminal_has_its_characters(encoding: str, is_shown: bool) -> None:
    console: Any = SimpleNamespace(encoding=encoding)
    manifest: Any = SimpleNamespace(training=SimpleNamespace(losses=[(1, 4.0), (2, 3.0), (3, 1.0)]))
    assert Console().encoding
    assert loss_curve(manifest, console) == ("█▆▁  1.0000 to 4.0000" if is_shown else None)
