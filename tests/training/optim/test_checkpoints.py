"""Training goes on where it was stopped, to the same losses and the same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from svdconvert.config.train import TrainOptions
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.optim.checkpoints import Checkpoints
from svdconvert.training.optim.loop import fit
from svdconvert.training.optim.objective import NextToken
from tests.training.optim.test_loop import PLAN, adapted, examples, held_out_losses, run, weights

MakeModel = Callable[..., LlamaForCausalLM]
# Dropout, so that the generators count; moments and a schedule, so that the optimizer and the step do.
COURSE = replace(PLAN, steps=7, batch_size=2, accumulate=2, dropout=0.3, schedule="cosine", eval_every=2)


def states(folder: Path, every: int = 1) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", every=every)


def stopped(model: LlamaForCausalLM, plan: TrainOptions, folder: Path, logs: int, every: int = 1) -> None:
    """Train until so many logs were seen, and leave without a word."""
    rows = DataSplits(examples(10), examples(3, seed=5))
    course = fit(model, rows, NextToken(2), plan, None, states(folder, every))
    for _ in range(logs):
        next(course)
    course.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("plan", [COURSE, replace(COURSE, precision="bf16")], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seen", [3, 5, 9])
def test_a_stopped_run_ends_like_one_that_was_not(
    plan: TrainOptions, seen: int, make_model: MakeModel, tmp_path: Path
) -> None:
    rows = {"train": examples(10), "held_out": examples(3, seed=5)}
    whole, parts = adapted(make_model(), 0.3), adapted(make_model(), 0.3)
    expected = run(whole, plan, **rows)
    stopped(adapted(make_model(), 0.3), plan, tmp_path, seen)
    torch.manual_seed(99)
    step = states(tmp_path).step
    assert step > 0
    logs = run(parts, plan, **rows, checkpoints=states(tmp_path))
    assert logs == [log for log in expected if log.step > step]
    assert all(torch.equal(tensor, weights(parts)[name]) for name, tensor in weights(whole).items())


def test_without_a_checkpoint_it_begins_anew(make_model: MakeModel, tmp_path: Path) -> None:
    stopped(adapted(make_model(), 0.3), COURSE, tmp_path, 4, every=5)
    assert states(tmp_path).step == 0
    rows = {"train": examples(10), "held_out": examples(3, seed=5)}
    again = run(adapted(make_model(), 0.3), COURSE, **rows, checkpoints=states(tmp_path))
    assert again == run(adapted(make_model(), 0.3), COURSE, **rows)


def test_the_newest_two_are_kept(make_model: MakeModel, tmp_path: Path) -> None:
    run(adapted(make_model()), replace(PLAN, steps=5), checkpoints=states(tmp_path))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004.pt", "step-00000005.pt"]


def test_a_checkpoint_that_was_cut_short_gives_way_to_the_one_before(
    make_model: MakeModel, tmp_path: Path
) -> None:
    run(adapted(make_model()), replace(PLAN, steps=3), checkpoints=states(tmp_path))
    newest = tmp_path / "checkpoints" / "step-00000003.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    assert states(tmp_path).step == 2
    state = states(tmp_path).newest()
    assert state is not None and state["course"]["step"] == 2


def test_every_checkpoint_is_noted(make_model: MakeModel, tmp_path: Path) -> None:
    noted: list[int] = []
    checkpoints = replace(states(tmp_path, every=2), saved=noted.append)
    run(adapted(make_model()), replace(PLAN, steps=5), checkpoints=checkpoints)
    assert noted == [2, 4]
    run(adapted(make_model()), replace(PLAN, steps=5), checkpoints=replace(checkpoints, leads=False))
    assert noted == [2, 4]


# --- when to stop, and what to keep ------------------------------------------------------------------------

# So high a rate that the held-out loss falls at first and rises then.
RISING = replace(PLAN, steps=30, lr=0.05, eval_every=1, eval_rows=1, schedule="constant")


def test_patience_ends_a_run_that_no_longer_improves(make_model: MakeModel) -> None:
    measured = held_out_losses(run(adapted(make_model()), RISING, held_out=examples(3, seed=5)))
    stopped_at = held_out_losses(
        run(adapted(make_model()), replace(RISING, patience=3), held_out=examples(3, seed=5))
    )
    assert stopped_at.items() <= measured.items()
    last = max(stopped_at)
    assert last < 30
    assert min(stopped_at, key=stopped_at.__getitem__) == last - 3


def test_the_best_weights_are_those_of_the_least_held_out_loss(make_model: MakeModel, tmp_path: Path) -> None:
    held_out, plan = examples(3, seed=5), replace(RISING, steps=12)
    measured = held_out_losses(run(adapted(make_model()), plan, held_out=held_out))
    best = min(measured, key=measured.__getitem__)
    assert 0 < best < 12
    until, kept = adapted(make_model()), adapted(make_model())
    run(until, replace(plan, steps=best), held_out=held_out)
    run(kept, replace(plan, keep_best=True), held_out=held_out)
    assert all(torch.equal(tensor, weights(kept)[name]) for name, tensor in weights(until).items())
    # and a run that goes on has not forgotten them
    resumed, rows = adapted(make_model()), DataSplits(examples(12), held_out)
    plan = replace(plan, keep_best=True)
    course = fit(adapted(make_model()), rows, NextToken(2), plan, None, states(tmp_path))
    assert any(log.step == best + 2 for log in course)
    course.close()  # type: ignore[attr-defined]
    assert states(tmp_path).step > best
    list(fit(resumed, rows, NextToken(2), plan, None, states(tmp_path)))
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(until).items())
