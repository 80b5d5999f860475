"""The schedules are those of transformers, without the wasted first step of their warm-up."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from svdconvert.config.train import TrainOptions
from svdconvert.training.optim.schedule import learning_rate
from tests.training.small_runs import OPTIONS, MakeModel, adapted, run


def rates(total: int, **arguments: Any) -> list[float]:
    options = TrainOptions(lr=1.0, **arguments)
    return [learning_rate(options, step, total) for step in range(1, total + 1)]


def test_the_warm_up_rises_to_the_rate_and_wastes_no_step() -> None:
    assert rates(8, warmup=0.5, schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    # a share of a step is a step
    assert rates(4, warmup=0.03, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_the_schedules_reach_zero_after_the_last_step() -> None:
    assert rates(4, warmup=0.0, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(4, warmup=0.0, schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])
    assert rates(3, warmup=0.0, schedule="constant") == [1.0, 1.0, 1.0]


def transformers_rates(schedule: str, warm: int, total: int) -> list[float]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warm, num_training_steps=total)
    expected = []
    for _ in range(total):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedules_are_those_of_transformers_without_the_first_step_of_rate_zero(schedule: str) -> None:
    assert rates(20, warmup=0.0, schedule=schedule) == pytest.approx(transformers_rates(schedule, 0, 20))
    assert rates(20, warmup=0.15, schedule=schedule) == pytest.approx(transformers_rates(schedule, 3, 21)[1:])


def test_options_without_a_learning_rate_fail_an_assertion(make_model: MakeModel) -> None:
    with pytest.raises(AssertionError, match="with_default_lr"):
        run(adapted(make_model()), replace(OPTIONS, lr=None))
