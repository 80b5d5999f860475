"""A step updates with AdamW and clips, and several processes share its rows."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from svdconvert.config.train import TrainOptions
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.optim.loop import StepLog
from svdconvert.training.optim.objective import NextToken
from svdconvert.training.optim.step import Trainer, make_adamw
from tests.training.small_runs import OPTIONS, MakeModel, adapted, run, weights


def test_the_learning_rate_reaches_the_optimizer_and_the_log(make_model: MakeModel) -> None:
    options = replace(OPTIONS, lr=1e-3, steps=1, warmup=0.0, schedule="constant", clip=0.0)
    model = adapted(make_model())
    before = weights(model)
    (log,) = run(model, options)
    assert isinstance(log, StepLog)
    assert log.lr == 1e-3
    # AdamW's first step is the rate itself, in the direction of the gradient's sign.
    moves = torch.cat([(tensor - before[name]).abs().flatten() for name, tensor in weights(model).items()])
    assert moves.median() == pytest.approx(1e-3, rel=1e-2)


def test_weight_decay_shrinks_the_adapter(make_model: MakeModel) -> None:
    options = replace(OPTIONS, lr=1e-3, steps=1, weight_decay=100.0)
    plain, decayed = adapted(make_model()), adapted(make_model())
    run(plain, replace(options, weight_decay=0.0))
    run(decayed, options)
    start = weights(adapted(make_model()))
    for name, tensor in weights(plain).items():
        # AdamW takes rate x decay = 0.1 of the value, apart from the gradient's own step.
        torch.testing.assert_close(weights(decayed)[name], tensor - 0.1 * start[name])


def test_clipping_bounds_the_norm_of_all_gradients_together(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **arguments: Any) -> Any:
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat(grads).norm()))
        return step(self, *args, **arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(adapted(make_model()), replace(OPTIONS, steps=2, clip=0.0))
    assert min(norms) > 0.05
    norms.clear()
    run(adapted(make_model()), replace(OPTIONS, steps=2, clip=0.05))
    assert norms == pytest.approx([0.05, 0.05], rel=1e-3)


def test_adamw_is_torchs_fused_kernel_on_cuda_only() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert make_adamw([parameter], 0.0, torch.device("cuda")).defaults["fused"]
    assert not make_adamw([parameter], 0.0, torch.device("cpu")).defaults["fused"]


SHARED = TrainOptions(batch_size=2, accumulate=2)
ROWS = [
    Example(torch.full((3,), n, dtype=torch.int32), torch.full((3,), n, dtype=torch.int32)) for n in range(13)
]


def trainer(process: int, processes: int) -> Trainer:
    shared = SimpleNamespace(process_index=process, num_processes=processes, device=torch.device("cpu"))
    absent = cast(Any, None)
    return Trainer(absent, absent, absent, NextToken(0), SHARED, cast(Any, shared))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_row_is_in_the_loss_of_exactly_one_process(processes: int) -> None:
    for step in range(1, SHARED.total_steps(len(ROWS), processes) + 1):
        rows = trainer(0, processes).examples_of(step, ROWS)
        shares = [list(trainer(process, processes).batches(rows)) for process in range(processes)]
        learned = [
            int(row[0]) for share in shares for batch in share for row in batch["labels"] if row[0] != IGNORED
        ]
        assert sorted(learned) == sorted(int(row.input_ids[0]) for row in rows)
        # They wait for each other in every batch, so one without work takes part all the same.
        assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_steps_of_an_epoch_are_all_rows_once(processes: int) -> None:
    steps = range(1, SHARED.steps_per_epoch(len(ROWS), processes) + 1)
    seen = [int(row.input_ids[0]) for step in steps for row in trainer(0, processes).examples_of(step, ROWS)]
    assert sorted(seen) == list(range(13))
