"""Rows with a label of their own: a class or a number for a text or a pair of texts, as in GLUE."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError, did_you_mean
from svdconvert.training.data.example import Example
from svdconvert.training.data.prompts import Row, known_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GLUE's, in order of preference.
FIELD_SETS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "passage"),
    ("sentence",),
    ("text",),
)


@dataclass
class Labelled:
    """Encodes rows; the first file that it reads says which labels there are."""

    tokenizer: "PreTrainedTokenizerBase"
    plan: TrainOptions
    labels: list[str] = field(default_factory=list)
    """The names of the classes in order; none for numbers."""

    def __call__(self, rows: Iterable[Row]) -> list[Example | None]:
        """One entry a row. Raises DataError, which names the row, for what cannot be used."""
        read = []
        fields: tuple[str, ...] = ()
        for number, row in enumerate(rows, start=1):
            try:
                fields = fields or _fields(row, self.plan)
                read.append(([_text(row, name) for name in fields], self._label(row)))
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
        if self.plan.task == "classify" and not self.labels:
            self.labels = _in_order({str(label) for _, label in read})
        return [self._example(texts, label, number) for number, (texts, label) in enumerate(read, start=1)]

    def _label(self, row: Row) -> str | float:
        name = self.plan.label_field
        value = row.get(name)
        if value is None or value == "":
            raise DataError(f"it has no {name}; its fields are {did_you_mean(name, row)}")
        if self.plan.task == "classify":
            return str(int(value)) if isinstance(value, bool | float) else str(value)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"its {name} is {value!r} and no number") from error

    def _example(self, texts: Sequence[str], label: str | float, number: int) -> Example:
        if isinstance(label, str) and label not in self.labels:
            raise DataError(f"row {number}: its label {label!r} is not one of {', '.join(self.labels)}")
        whole = self.tokenizer(*texts, verbose=False)["input_ids"]
        # The longer of two texts gives way, and the special tokens stay.
        cut = self.tokenizer(*texts, truncation="longest_first", max_length=self.plan.max_length)
        target: Any = torch.tensor(self.labels.index(label) if isinstance(label, str) else label)
        types = cut.get("token_type_ids")
        return Example(
            torch.tensor(cut["input_ids"], dtype=torch.int32),
            target,
            len(whole),
            types=None if types is None else torch.tensor(types, dtype=torch.int32),
        )


def _fields(row: Row, plan: TrainOptions) -> tuple[str, ...]:
    names = plan.text_fields
    named = None if names is None else tuple(name.strip() for name in names.split(","))
    return known_fields(row, named, FIELD_SETS, "text_fields")


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"its {name} is not text but {type(value).__name__}")
    return value


def _in_order(labels: set[str]) -> list[str]:
    """Numbers by size, all else by the alphabet."""
    numbers = all(label.lstrip("-").isdigit() for label in labels)
    return sorted(labels, key=lambda label: (int(label), "") if numbers else (0, label))
