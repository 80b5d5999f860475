"""Training that is killed, in one process or two, and what must be the same for it to continue."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert import Run, TrainOptions, train
from svdconvert.commands.decompose import decompose
from svdconvert.config.options import SplitOptions
from svdconvert.errors import OutputError, SvdConvertError
from svdconvert.output.ownership import staging_directory
from tests.commands.test_ranks import TORCHRUN, _kill_rank
from tests.conftest import Build
from tests.process import finish, start, sums
from tests.program import succeeded
from tests.reading import readable, write_sums
from tests.stock import tensors

OPTIONS: dict[str, Any] = {
    "steps": 40,
    "batch_size": 2,
    "max_length": 48,
    "eval_rows": 4,
    "eval_every": 7,
    "save_every": 3,
    "dropout": 0.1,
    "precision": "fp32",
    "lr": 1e-3,
}


def _words(options: dict[str, Any]) -> list[object]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def prepared(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `start`, which decompose wrote, and sums.jsonl."""
    home = tmp_path_factory.mktemp("prepared")
    base = readable(checkpoint("llama", dtype=torch.float32), home / "base")
    decompose(base, home / "start", SplitOptions(rank=4), Run(threads=1))
    write_sums(home / "sums.jsonl", rows=24)
    return home


def wait_for_checkpoint(process: "subprocess.Popen[str]", out: Path) -> None:
    """Return when the run for `out` has saved a checkpoint, or has ended."""
    folder = staging_directory(out) / "checkpoints"
    while process.poll() is None and not any(folder.glob("step-*.pt")) and not out.exists():
        time.sleep(0.001)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_run_ends_in_the_bytes_of_an_undisturbed_one(prepared: Path, tmp_path: Path) -> None:
    train(
        prepared / "start",
        tmp_path / "undisturbed",
        TrainOptions(data=str(prepared / "sums.jsonl"), **OPTIONS),
        Run(threads=1),
    )
    out = tmp_path / "out"
    command = ["train", prepared / "start", "-o", out, "--data", prepared / "sums.jsonl", *_words(OPTIONS)]
    process = start(*command)
    wait_for_checkpoint(process, out)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert staging_directory(out).exists() and not out.exists()
    assert f"going on from {out}.partial: " in succeeded(*command, "--threads", 1).err
    assert sums(out) == sums(tmp_path / "undisturbed")
    assert not staging_directory(out).exists()


@pytest.mark.slow
def test_a_slow_run_saves_checkpoints_by_the_clock_too(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = TrainOptions(data=str(prepared / "sums.jsonl"), **{**OPTIONS, "steps": 6, "save_every": 100})

    def interrupt(log: object, steps: int) -> None:
        if getattr(log, "step", 0) == 4:
            raise KeyboardInterrupt

    run = Run(device="cpu", threads=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("svdconvert.training.run.LONGEST", 0.0)
        train(prepared / "start", tmp_path / "out", chosen, run, watch=interrupt)
    assert (staging_directory(tmp_path / "out") / "checkpoints" / "step-00000003.pt").exists()
    said: list[str] = []
    train(prepared / "start", tmp_path / "out", chosen, replace(run, notify=said.append))
    assert any("3 steps are done" in sentence for sentence in said)
    train(prepared / "start", tmp_path / "undisturbed", chosen, run)
    assert sums(tmp_path / "out") == sums(tmp_path / "undisturbed")


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_train_like_one_with_twice_the_accumulation(prepared: Path, tmp_path: Path) -> None:
    changes = {"dropout": 0.0, "steps": 10, "save_every": 2}
    options = TrainOptions(data=str(prepared / "sums.jsonl"), **{**OPTIONS, **changes}, accumulate=2)
    train(prepared / "start", tmp_path / "one", options, Run(threads=1))
    out = tmp_path / "two"
    command = [
        "train",
        prepared / "start",
        "-o",
        out,
        "--data",
        prepared / "sums.jsonl",
        *_words({**OPTIONS, **changes}),
    ]
    launcher = start(*command, program=TORCHRUN)
    wait_for_checkpoint(launcher, out)
    _kill_rank(launcher.pid, "1")
    _, said = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert f"continues from {out}.partial" in said or "another rank died" in said, said
    assert staging_directory(out).exists() and not out.exists()
    finish(start(*command, program=TORCHRUN))
    assert sums(out).keys() == sums(tmp_path / "one").keys()
    one, two = metrics(tmp_path / "one"), metrics(out)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    mine, theirs = tensors(out), tensors(tmp_path / "one")
    assert all(torch.allclose(mine[name], tensor, atol=2e-4) for name, tensor in theirs.items())


class Stop(Exception):
    """Ends a run as if its process had been killed."""


def interrupt(prepared: Path, out: Path, **changes: object) -> None:
    """Train until step 8, two steps after a checkpoint."""

    def watch(log: object, steps: int) -> None:
        if getattr(log, "step", 0) == 8:
            raise Stop

    options = TrainOptions(**{"data": str(prepared / "sums.jsonl"), **OPTIONS, **changes})
    with pytest.raises(Stop):
        train(prepared / "start", out, options, Run(threads=1), watch=watch)
    assert staging_directory(out).exists() and not out.exists()


def test_options_that_do_not_shape_the_result_may_change_and_checkpoints_may_be_kept(
    prepared: Path, tmp_path: Path
) -> None:
    interrupt(prepared, tmp_path / "out")
    changed = {**OPTIONS, "save_every": 20, "save_limit": 1, "keep_checkpoints": True}
    said: list[str] = []
    options = TrainOptions(data=str(prepared / "sums.jsonl"), **changed)
    train(prepared / "start", tmp_path / "out", options, Run(threads=1, notify=said.append))
    # Advice about the rate and the dropout may stand before it.
    assert said[-1] == f"going on from {tmp_path}/out.partial: 6 steps are done"
    train(
        prepared / "start",
        tmp_path / "undisturbed",
        TrainOptions(data=str(prepared / "sums.jsonl"), **OPTIONS),
        Run(threads=1),
    )
    found = sums(tmp_path / "out")
    wanted = sums(tmp_path / "undisturbed")
    assert found.pop("checkpoints/step-00000040.pt")
    assert found.pop("svdconvert.json") != wanted.pop("svdconvert.json")  # which lists the checkpoint
    assert found == wanted


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 2e-3}, "options.lr was 0.001 and is 0.002"), ({"steps": 41}, "options.steps was 40 and is 41")],
)
def test_a_changed_option_is_refused_by_name(
    prepared: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    interrupt(prepared, tmp_path / "out")
    options = TrainOptions(**{"data": str(prepared / "sums.jsonl"), **OPTIONS, **change})
    with pytest.raises(OutputError, match=named) as refusal:
        train(prepared / "start", tmp_path / "out", options, Run(threads=1))
    assert "--overwrite" in str(refusal.value)
    assert staging_directory(tmp_path / "out").exists()


def test_changed_data_are_refused_by_name(prepared: Path, tmp_path: Path) -> None:
    rows = write_sums(tmp_path / "sums.jsonl", rows=24)
    interrupt(prepared, tmp_path / "out", data=str(rows))
    write_sums(rows, rows=23)
    options = TrainOptions(data=str(rows), **OPTIONS)
    with pytest.raises(SvdConvertError, match=r"sums\.jsonl has changed since .*out\.partial was begun"):
        train(prepared / "start", tmp_path / "out", options, Run(threads=1))
    train(prepared / "start", tmp_path / "out", options, Run(threads=1, overwrite=True))
    assert [line["step"] for line in metrics(tmp_path / "out") if "loss" in line] == list(range(1, 41))
