"""Examples of different lengths become one batch, and padding is never in the loss."""

from typing import Any

import torch

from svdconvert.training.data.example import IGNORED, collate, padding_id
from svdconvert.training.data.packing import pack_examples
from tests.training.data.test_packing import rows_of
from tests.training.encoding import one


def test_padding_with_the_end_of_sequence_token_is_not_in_the_loss(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id is None
    pad = padding_id(tokenizer)
    assert pad == tokenizer.eos_token_id
    short = one({"prompt": "a", "completion": "b"}, tokenizer)
    long = one({"prompt": "a", "completion": "bcd"}, tokenizer)
    batch = collate([short, long], pad)
    assert batch["input_ids"].tolist() == [short.input_ids.tolist() + [pad, pad], long.input_ids.tolist()]
    assert batch["labels"][0].tolist() == short.labels.tolist() + [IGNORED, IGNORED]
    assert batch["labels"][0, 3] == pad
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_position_ids_restart_at_every_packed_row_and_at_the_padding() -> None:
    batch = collate([*pack_examples(rows_of(3, 2), 10), *rows_of(7)], pad_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert "position_ids" not in collate(rows_of(7, 2), pad_id=0)
