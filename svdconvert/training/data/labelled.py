"""Encode rows with a label: a class or a number for a text or a pair of texts, as in GLUE."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError, brief, did_you_mean
from svdconvert.training.data.example import Example
from svdconvert.training.data.rows import FieldSet, Row, find_fields, valid_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The field names of the GLUE tasks, in order of preference.
FIELD_SETS: tuple[FieldSet, ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "passage"),
    ("sentence",),
    ("text",),
)

_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclass
class LabelledRowEncoder:
    """A callable that encodes rows; the first data set that it encodes determines the classes."""

    tokenizer: "PreTrainedTokenizerBase"
    options: TrainOptions
    labels: list[str] = field(default_factory=list)
    """The names of the classes, in order; empty for regression."""
    used_fields: set[str] = field(default_factory=set)
    """The fields of the rows encoded last that influence the result."""
    unused_keys: dict[str, None] = field(default_factory=dict)
    """Empty: these rows have no messages."""
    remarks: list[str] = field(default_factory=list)
    """Empty: there is nothing to say about these rows."""

    def __call__(self, rows: Iterable[Row], folder: Path | None = None) -> list[Example | None]:
        """One example per row; these rows have no images, so `folder` is not used.

        Raises DataError, which names the row, if a text or label cannot be used.
        """
        parsed: list[tuple[list[str], str | float]] = []
        fields: FieldSet = ()
        for number, row in enumerate(rows, start=1):
            try:
                fields = fields or _text_fields(row, self.options)
                parsed.append(([_text(row, name) for name in fields], self._label(row)))
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
        self.used_fields = {*fields, self.options.label_field}
        if self.options.task == "classify" and not self.labels:
            self.labels = _sorted_labels({str(label) for _, label in parsed})
        return [self._example(texts, label, number) for number, (texts, label) in enumerate(parsed, start=1)]

    def _label(self, row: Row) -> str | float:
        name = self.options.label_field
        value = row.get(name)
        if value is None or value == "":
            raise DataError(f"it has no {name}; its fields are {did_you_mean(name, row)}")
        if self.options.task == "classify":
            if not isinstance(value, str | int) and not (isinstance(value, float) and value.is_integer()):
                raise DataError(f"its {name} is {brief(value)}, which is no class (a text or an integer)")
            return value if isinstance(value, str) else str(int(value))
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"its {name} is {brief(value)}, which is not a number") from error
        if not torch.tensor(number).isfinite():
            raise DataError(f"its {name} is {brief(value)}, which is not a finite number in float32")
        return number

    def _example(self, texts: Sequence[str], label: str | float, number: int) -> Example:
        if isinstance(label, str) and label not in self.labels:
            raise DataError(f"row {number}: its label {label!r} is not one of {', '.join(self.labels)}")
        all_ids = self.tokenizer(*texts, verbose=False)["input_ids"]
        # Of two texts the longer one is truncated first; special tokens are kept.
        truncated = self.tokenizer(*texts, truncation="longest_first", max_length=self.options.max_length)
        target: Any = torch.tensor(self.labels.index(label) if isinstance(label, str) else label)
        types = truncated.get("token_type_ids")
        return Example(
            torch.tensor(truncated["input_ids"], dtype=torch.int32),
            target,
            len(all_ids),
            token_types=None if types is None else torch.tensor(types, dtype=torch.int32),
        )


def _text_fields(row: Row, options: TrainOptions) -> FieldSet:
    named = None
    if options.text_fields is not None:
        named = tuple(name.strip() for name in options.text_fields.split(","))
    return find_fields(row, named, FIELD_SETS, "`text_fields`")


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"its {name} is not text but {type(value).__name__}")
    return valid_text(value)


def _sorted_labels(labels: set[str]) -> list[str]:
    """In numerical order if all labels are integers, else in alphabetical order."""
    are_numbers = all(_INTEGER.fullmatch(label) for label in labels)
    return sorted(labels, key=lambda label: (int(label), "") if are_numbers else (0, label))
