"""Trackers get the metrics, and one that is not installed is refused."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from svdconvert import Run, train
from svdconvert.errors import MissingPackageError
from tests.program import content, refused
from tests.training.small_runs import LORA, json_lines, text_options


def test_tensorboard_gets_the_metrics(base: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track = {"track": "tensorboard", "track_dir": str(tmp_path / "runs")}
    train(base, tmp_path / "out", text_options(base, **track), Run(threads=1), split=LORA)
    train(base, tmp_path / "silent", text_options(base), Run(threads=1), split=LORA)
    assert content(tmp_path / "out") == content(tmp_path / "silent")
    (folder,) = {path.parent for path in (tmp_path / "runs" / "out").glob("events*")}
    read = events.EventAccumulator(str(folder))
    read.Reload()
    metrics = json_lines(tmp_path / "out" / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in metrics if "loss" in line}
    found = {event.step: event.value for event in read.Scalars("loss")}
    assert found == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in read.Scalars("eval_loss")] == [0, 2, 4]


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdconvert.training.logs.trackers.find_spec", lambda name: None)
    with pytest.raises(
        MissingPackageError, match=r'wandb is not installed: pip install "svdconvert\[wandb\]"'
    ):
        train(base, tmp_path / "out", text_options(base, track="wandb"), split=LORA)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_the_name_of_a_tracker_is_not_a_tracker(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()  # as its runs leave one
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match="wandb is not installed"):
        train(base, tmp_path / "out", text_options(base, track="wandb"), split=LORA)


def test_an_unknown_tracker_is_refused(base: Path, tmp_path: Path) -> None:
    words = ["track knows tensorboard, trackio, wandb, not mlflow"]
    refused("train", base, "-o", tmp_path / "out", "--data", "x", "--track", "mlflow", words=words)
