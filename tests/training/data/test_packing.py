"""Packed rows are complete and do not attend to each other, in any model family."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from svdconvert.commands.train import train
from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.training.data.example import IGNORED, Example, collate
from svdconvert.training.data.packing import pack_examples, require_packing_support
from svdconvert.training.model.modes import training_mode
from svdconvert.training.optim.objective import NextToken
from tests import tiny
from tests.conftest import Build
from tests.reading import readable, write_sums
from tests.stock import tensors

PACKING = [kind for kind in tiny.PEFT_MODEL_TYPES if kind in tiny.CAUSAL]
"""Without encoders, whose attention is not causal."""


def rows_of(*lengths: int) -> list[Example]:
    ids = [torch.full((length,), length, dtype=torch.int32) for length in lengths]
    return [Example(row, row.clone(), len(row)) for row in ids]


def test_packing_fills_sequences_and_keeps_every_row() -> None:
    packs = pack_examples(rows_of(3, 8, 5, 2, 4, 10), 10)
    assert [row.input_ids.tolist() for row in packs] == [
        [10] * 10,
        [8] * 8 + [2] * 2,
        [5] * 5 + [4] * 4,
        [3] * 3,
    ]
    assert [row.starts for row in packs] == [(0,), (0, 8), (0, 5), (0,)]


def test_the_first_token_of_a_packed_row_is_not_in_the_loss() -> None:
    (packed,) = pack_examples(rows_of(3, 2), 10)
    assert packed.labels.tolist() == [IGNORED, 3, 3, IGNORED, 2]
    assert packed.loss_tokens == sum(row.loss_tokens for row in rows_of(3, 2))


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 50, (n,), generator=generator, dtype=torch.int32) for n in (9, 4, 6, 3, 11)]
    return [Example(row, row.clone(), len(row)) for row in ids]


def loss(model: PreTrainedModel, batch: list[Example]) -> float:
    objective = NextToken(0)
    with torch.no_grad():
        return float(objective.loss_sum(model, model, objective.batch(batch)))


@pytest.mark.parametrize("model_type", PACKING)
def test_packed_rows_have_the_same_loss_as_separate_rows(model_type: str, checkpoint: Build) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type, dtype=torch.float32))
    apart, packed = rows(), pack_examples(rows(), 24)
    with training_mode(model):
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


def test_a_model_that_takes_no_position_ids_is_refused() -> None:
    class Recurrent(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(RecipeError, match="Recurrent cannot keep packed rows apart: train without packing"):
        require_packing_support(Recurrent())


def test_packing_takes_fewer_steps_for_the_same_rows(checkpoint: Build, tmp_path: Path) -> None:
    base = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "base")
    data = write_sums(tmp_path / "sums.jsonl", rows=12)
    options = {"data": str(data), "template": "none", "max_length": 64, "batch_size": 1, "epochs": 1.0}
    split = SplitOptions(rank=4)
    train(base, tmp_path / "packed", TrainOptions(**options, packing=True), split=split)
    train(base, tmp_path / "plain", TrainOptions(**options), split=split)
    steps = [(tmp_path / out / "metrics.jsonl").read_text().count('"lr"') for out in ("packed", "plain")]
    assert (steps[0] < 5, steps[1]) == (True, 12)
    assert tensors(tmp_path / "packed").keys() == tensors(tmp_path / "plain").keys()
