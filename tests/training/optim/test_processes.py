"""How several processes share the rows of a step; test_loop.py trains with one."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from svdconvert.config.train import TrainOptions
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.optim.objective import NextToken
from svdconvert.training.optim.step import Trainer

PLAN = TrainOptions(batch_size=2, accumulate=2)
ROWS = [
    Example(torch.full((3,), n, dtype=torch.int32), torch.full((3,), n, dtype=torch.int32)) for n in range(13)
]


def trainer(process: int, processes: int) -> Trainer:
    shared = SimpleNamespace(process_index=process, num_processes=processes, device=torch.device("cpu"))
    absent = cast(Any, None)
    return Trainer(absent, absent, absent, NextToken(0), PLAN, cast(Any, shared))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_row_is_in_the_loss_of_exactly_one_process(processes: int) -> None:
    for step in range(1, PLAN.total_steps(len(ROWS), processes) + 1):
        rows = trainer(0, processes).rows_of(step, ROWS)
        shares = [list(trainer(process, processes).batches(rows)) for process in range(processes)]
        learnt = [
            int(row[0]) for share in shares for batch in share for row in batch["labels"] if row[0] != IGNORED
        ]
        assert sorted(learnt) == sorted(int(row.input_ids[0]) for row in rows)
        # They wait for each other in every batch, so one without work takes part all the same.
        assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_steps_of_an_epoch_are_all_rows_once(processes: int) -> None:
    steps = range(1, PLAN.steps_per_epoch(len(ROWS), processes) + 1)
    seen = [int(row.input_ids[0]) for step in steps for row in trainer(0, processes).rows_of(step, ROWS)]
    assert sorted(seen) == list(range(13))
