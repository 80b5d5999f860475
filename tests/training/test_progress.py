"""What `Run.track` is told of a training run."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert import Progress, Run, SplitOptions, TrainOptions, decompose, train
from svdconvert.training.optim import loop
from tests.conftest import Build
from tests.reading import readable, write_sums
from tests.training.small_runs import json_lines


@pytest.fixture(scope="module")
def start(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("progress")
    base = readable(checkpoint("llama", dtype=torch.bfloat16, tied=False), home / "base")
    write_sums(home / "rows.jsonl", rows=20)
    decompose(base, home / "pissa", SplitOptions(rank=4), Run(device="cpu", threads=1))
    return home


def options(home: Path, **changes: Any) -> TrainOptions:
    given = {"steps": 8, "batch_size": 4, "eval_rows": 6, "eval_every": 4, "save_every": 2, "lr": 1e-3}
    return TrainOptions(data=str(home / "rows.jsonl"), **given | changes)


def run(track: Callable[[Progress], None]) -> Run:
    return Run(device="cpu", threads=1, track=track)


def test_every_phase_is_reported_to_its_end(start: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    train(start / "pissa", tmp_path / "out", options(start, samples=2, sample_tokens=2), run(seen.append))
    phases = [*dict.fromkeys(progress.phase for progress in seen)]
    assert phases == ["check", "read rows", "load weights", "train", "held-out", "sample"]
    of = {phase: [progress for progress in seen if progress.phase == phase] for phase in phases}
    assert [progress for progress in seen if progress.total and progress.done > progress.total] == []
    assert of["read rows"][-1].facts["name"] == str(start / "rows.jsonl")
    assert {(p.done, p.total, p.unit) for p in of["held-out"]} == {(n, 6, "rows") for n in (0, 4, 6)}
    assert {(p.done, p.total, p.unit) for p in of["sample"]} == {(n, 2, "prompts") for n in (0, 1)}
    assert [*dict.fromkeys(p.done for p in of["train"])] == [*range(9)]
    assert of["load weights"][-1].done == of["load weights"][-1].total
    last = of["train"][-1]
    logs = json_lines(tmp_path / "out" / "metrics.jsonl")
    assert last.facts["loss"] == [log["loss"] for log in logs if "loss" in log][-1]
    assert last.facts["held_out"] == [log["eval_loss"] for log in logs if "eval_loss" in log][-1]


def test_the_speed_is_that_of_the_last_steps_alone(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which each step takes a second, whatever loading and measuring take."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(loop, "perf_counter", lambda: float(next(ticks)))
    seen: list[Progress] = []
    train(start / "pissa", tmp_path / "out", options(start), run(seen.append))
    speeds = {p.done: p.facts["tokens_per_second"] for p in seen if "tokens_per_second" in p.facts}
    tokens = [log["tokens"] for log in json_lines(tmp_path / "out" / "metrics.jsonl") if "tokens" in log]
    assert speeds == {step: pytest.approx(tokens[step - 1] / step) for step in range(1, 9)}


def test_an_exception_of_the_callback_stops_the_run_and_loses_no_checkpoint(
    start: Path, tmp_path: Path
) -> None:
    """Nothing goes on without its display, and the same call continues from the newest checkpoint."""

    def fail(progress: Progress) -> None:
        if progress.phase == "train" and progress.done == 7:
            raise ValueError("a broken display")

    train(start / "pissa", tmp_path / "whole", options(start), run(lambda progress: None))
    with pytest.raises(ValueError, match="a broken display"):
        train(start / "pissa", tmp_path / "out", options(start), run(fail))
    seen: list[Progress] = []
    train(start / "pissa", tmp_path / "out", options(start), run(seen.append))
    first = next(progress for progress in seen if progress.phase == "train")
    logs = json_lines(tmp_path / "out" / "metrics.jsonl")
    before = {log["step"]: log["eval_loss"] for log in logs if "eval_loss" in log}
    assert (first.done, first.facts) == (6, {"held_out": before[4]}), "the last held-out loss is known"
    resumed = [p.facts["tokens_per_second"] for p in seen if "tokens_per_second" in p.facts]
    assert len(resumed) >= 2
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_libraries_keep_their_own_settings_of_bars(enabled: bool, start: Path, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import utils
    from transformers.utils import logging

    def state() -> tuple[bool, bool, bool]:
        hub = not utils.are_progress_bars_disabled()
        return hub, logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()

    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # if the environment decides already
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
        (datasets.enable_progress_bars if enabled else datasets.disable_progress_bars)()
    chosen = state()
    hook = logging.set_tqdm_hook(None)
    train(
        start / "pissa",
        tmp_path / "out",
        options(start, steps=1, eval_every=None),
        run(lambda progress: None),
    )
    assert state() == chosen
    assert logging.set_tqdm_hook(hook) is None
    (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()
    (datasets.enable_progress_bars if before[2] else datasets.disable_progress_bars)()
