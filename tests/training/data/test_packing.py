"""Packed rows do not see each other, in any family of models."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from svdconvert.commands.train import train
from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.layouts.detect import find_layout
from svdconvert.training.data.encode import collate
from svdconvert.training.data.example import Example
from svdconvert.training.data.packing import pack, require_packing
from svdconvert.training.optim.objective import NextToken
from svdconvert.training.optim.step import as_trained
from tests import tiny
from tests.conftest import Build
from tests.program import refused
from tests.reading import readable, write_sums
from tests.stock import tensors

PACKING = [
    model_type
    for model_type in tiny.PEFT_MODEL_TYPES
    if find_layout(None, model_type, "")[1].task == "CAUSAL_LM"
]
"""Without encoders, whose attention is not causal."""


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 50, (n,), generator=generator, dtype=torch.int32) for n in (9, 4, 6, 3, 11)]
    return [Example(row, row.clone(), len(row)) for row in ids]


def loss(model: PreTrainedModel, batch: list[Example]) -> float:
    objective = NextToken(0)
    with torch.no_grad():
        return float(objective.loss_sum(model, model, objective.batch(batch)))


@pytest.mark.parametrize("model_type", PACKING)
def test_packed_rows_have_the_loss_of_rows_apart(model_type: str, checkpoint: Build) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type, dtype=torch.float32))
    apart, packed = rows(), pack(rows(), 24)
    with as_trained(model):
        _compare(model, apart, packed)


def _compare(model: PreTrainedModel, apart: list[Example], packed: list[Example]) -> None:
    assert len(packed) == 2
    expected = sum(loss(model, [row]) for row in apart)
    assert loss(model, packed) == pytest.approx(expected, rel=1e-5)
    # and it would have another, did they see each other
    batch = collate(packed, 0)
    del batch["position_ids"]
    seen = model(input_ids=batch["input_ids"]).logits
    kept = model(**{name: tensor for name, tensor in collate(packed, 0).items() if name != "labels"}).logits
    assert not torch.allclose(seen, kept, atol=1e-3)


def test_a_model_that_cannot_keep_rows_apart_is_refused() -> None:
    class Recurrent(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(RecipeError, match="Recurrent cannot keep packed rows apart: train without packing"):
        require_packing(Recurrent())


def test_packing_takes_fewer_steps_for_the_same_rows(checkpoint: Build, tmp_path: Path) -> None:
    base = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "base")
    data = write_sums(tmp_path / "sums.jsonl", rows=12)
    plan = {"data": str(data), "template": "none", "max_length": 64, "batch_size": 1, "epochs": 1.0}
    split = SplitOptions(rank=4)
    train(base, tmp_path / "packed", TrainOptions(**plan, packing=True), split=split)
    train(base, tmp_path / "plain", TrainOptions(**plan), split=split)
    steps = [(tmp_path / out / "metrics.jsonl").read_text().count('"lr"') for out in ("packed", "plain")]
    assert (steps[0] < 5, steps[1]) == (True, 12)
    assert tensors(tmp_path / "packed").keys() == tensors(tmp_path / "plain").keys()


def test_a_plan_says_what_it_lacks() -> None:
    refused(
        "train", "x", "-o", "y", "--data", "z", "--patience", 2, words=["patience", "held-out", "eval_rows"]
    )
