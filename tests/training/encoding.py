"""Encode one row, and read back what was encoded."""

from typing import Any

from svdconvert.config.train import TrainOptions
from svdconvert.training.data.encode import TextRowEncoder
from svdconvert.training.data.example import IGNORED, Example

PLAIN = TrainOptions(template="none")


def one(row: dict[str, Any], tokenizer: Any, options: TrainOptions = PLAIN) -> Example:
    (example,) = TextRowEncoder(tokenizer, options)([row])
    assert example is not None
    return example


def text(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.input_ids.tolist()))


def learned(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.labels[example.labels != IGNORED].tolist()))
