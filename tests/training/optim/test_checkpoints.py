"""Training continues where it was stopped, to the same losses and the same bits."""

import errno
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from svdconvert.config.train import TrainOptions
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.optim.checkpoints import Checkpoints
from svdconvert.training.optim.loop import fit
from svdconvert.training.optim.objective import NextToken
from tests.training.small_runs import OPTIONS, MakeModel, adapted, examples, run, weights

# Dropout, so that the generators count; moments and a schedule, so that the optimizer and the step do.
COURSE = replace(OPTIONS, steps=7, batch_size=2, accumulate=2, dropout=0.3, schedule="cosine", eval_every=2)


def states(folder: Path, every: int = 1) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", every=every)


def stopped(model: LlamaForCausalLM, options: TrainOptions, folder: Path, logs: int, every: int = 1) -> None:
    """Train until `logs` measurements were made, and close the iterator."""
    rows = DataSplits(examples(10), examples(3, seed=5))
    course = fit(model, rows, NextToken(2), options, None, states(folder, every))
    for _ in range(logs):
        next(course)
    course.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [COURSE, replace(COURSE, precision="bf16")], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seen", [3, 5, 9])
def test_a_resumed_run_ends_like_an_undisturbed_one(
    options: TrainOptions, seen: int, make_model: MakeModel, tmp_path: Path
) -> None:
    rows = {"train": examples(10), "held_out": examples(3, seed=5)}
    undisturbed = adapted(make_model(), 0.3)
    resumed = adapted(make_model(), 0.3)
    expected = run(undisturbed, options, **rows)
    stopped(adapted(make_model(), 0.3), options, tmp_path, seen)
    torch.manual_seed(99)
    step = states(tmp_path).step
    assert step > 0
    logs = run(resumed, options, **rows, checkpoints=states(tmp_path))
    assert logs == [log for log in expected if log.step > step]
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(undisturbed).items())


def test_without_a_checkpoint_training_starts_from_the_beginning(
    make_model: MakeModel, tmp_path: Path
) -> None:
    stopped(adapted(make_model(), 0.3), COURSE, tmp_path, 4, every=5)
    assert states(tmp_path).step == 0
    rows = {"train": examples(10), "held_out": examples(3, seed=5)}
    again = run(adapted(make_model(), 0.3), COURSE, **rows, checkpoints=states(tmp_path))
    assert again == run(adapted(make_model(), 0.3), COURSE, **rows)


def test_the_newest_two_checkpoints_are_kept(make_model: MakeModel, tmp_path: Path) -> None:
    run(adapted(make_model()), replace(OPTIONS, steps=5), checkpoints=states(tmp_path))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004.pt", "step-00000005.pt"]


def test_a_truncated_checkpoint_is_ignored(make_model: MakeModel, tmp_path: Path) -> None:
    run(adapted(make_model()), replace(OPTIONS, steps=3), checkpoints=states(tmp_path))
    newest = tmp_path / "checkpoints" / "step-00000003.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    assert states(tmp_path).step == 2
    state = states(tmp_path).load_newest()
    assert state is not None and state["progress"]["step"] == 2


def test_the_caller_is_notified_before_each_checkpoint_in_the_leading_process(
    make_model: MakeModel, tmp_path: Path
) -> None:
    newest: list[int] = []
    options = replace(OPTIONS, steps=5)
    checkpoints = states(tmp_path, every=2)
    checkpoints = replace(checkpoints, before_save=lambda: newest.append(states(tmp_path).step))
    run(adapted(make_model()), options, checkpoints=replace(checkpoints, leads=False))
    assert newest == [] and states(tmp_path).step == 0
    run(adapted(make_model()), options, checkpoints=checkpoints)
    assert newest == [0, 2] and states(tmp_path).step == 4


class BrokenFile(io.FileIO):
    """A file on a disk that is full after the first write."""

    writes = 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if self.writes > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_reported_as_that_and_not_as_a_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedWriter(BrokenFile(path, "w")))
    with pytest.raises(OSError, match="No space left on device"):
        states(tmp_path).save(1, {"weights": torch.randn(20_000)})
    monkeypatch.undo()
    assert states(tmp_path).step == 0


def test_checkpoints_that_cannot_be_deleted_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states(tmp_path).delete()  # there are none
    states(tmp_path).save(1, {})

    def broken(path: Any, **named: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "unlink", broken)
    with pytest.raises(OSError, match="Input/output error"):
        states(tmp_path).delete()
    monkeypatch.undo()
    states(tmp_path).delete()
    assert list(tmp_path.iterdir()) == []
