"""Everything that a run trains on: read, encoded, split into training and held-out examples, and packed."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_64

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.layouts.base import Layout
from svdconvert.training.data.encode import encode_rows
from svdconvert.training.data.example import Example, padding_id
from svdconvert.training.data.labelled import LabelledRowEncoder
from svdconvert.training.data.packing import pack_examples
from svdconvert.training.data.rows import Row, read_rows
from svdconvert.training.model.load import load_tokenizer
from svdconvert.training.optim.heads import SequenceLabel, require_scores
from svdconvert.training.optim.objective import NextToken, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EncodedRows = Sequence[Example | None]
"""One entry per row; None for a row without a token in the loss."""
Encoder = Callable[[Iterable[Row]], EncodedRows]
"""Raises DataError, which names the row, if a row cannot be used."""


@dataclass(frozen=True, slots=True)
class DataSplits:
    """The examples of a run."""

    train: Sequence[Example]
    held_out: Sequence[Example] = ()
    warnings: Sequence[str] = ()
    """One sentence for each kind of row that is truncated or left out."""
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Name of the data -> checksum of all its rows as read."""


@dataclass(frozen=True)
class TrainingData:
    """The examples of a run with the tokenizer and the objective that belong to them."""

    tokenizer: "PreTrainedTokenizerBase"
    splits: DataSplits
    objective: Objective
    labels: Sequence[str] | None = None
    """Names of the classes of a new head, empty for regression; None if the model keeps its own head."""


def open_training_data(
    weights: Path, layout: Layout, options: TrainOptions, *, trust_remote_code: bool = False
) -> TrainingData:
    """Read and encode all data that the options name, with the tokenizer of the model at `weights`.

    Raises DataError if data cannot be used, CheckpointError if there is no tokenizer, MissingPackageError if
    the scores of a classifier or regressor need a package that is not installed.
    """
    tokenizer = load_tokenizer(weights, layout, trust_remote_code=trust_remote_code)
    if options.task != "text":
        require_scores()
        encoder = LabelledRowEncoder(tokenizer, options)
        splits = read_dataset(options, encoder)
        objective = SequenceLabel(padding_id(tokenizer), len(encoder.labels))
        return TrainingData(tokenizer, splits, objective, encoder.labels)
    splits = read_dataset(options, partial(encode_rows, tokenizer=tokenizer, options=options))
    return TrainingData(tokenizer, splits, NextToken(padding_id(tokenizer)))


def read_dataset(options: TrainOptions, encoder: Encoder) -> DataSplits:
    """Read and encode all data that the options name. Raises DataError if something cannot be used."""
    if options.data is None:
        raise DataError("there is nothing to train on: give data a file or a Hub data set")
    checksums: dict[str, str] = {}
    rows = _read_encoded(options.data, options.split, options, encoder, checksums)
    warnings = list(_row_warnings(options.data, rows, options))
    if options.eval_data is not None:
        eval_split = options.eval_split or options.split
        held_out_rows = _read_encoded(options.eval_data, eval_split, options, encoder, checksums)
        warnings += _row_warnings(options.eval_data, held_out_rows, options)
    else:
        count = len(rows) - options.eval_rows
        if count <= 0:
            raise DataError(
                f"{options.data}: eval_rows holds out {options.eval_rows} of its {len(rows)} rows, which "
                "leaves none to train on; give fewer"
            )
        held_out_rows = rows[count:]
        rows = rows[:count]
    train = _usable_examples(rows, options.data, "training", options)
    held_out: list[Example] = []
    if held_out_rows:
        held_out = _usable_examples(held_out_rows, options.eval_data or options.data, "held-out", options)
    if options.packing:
        train = pack_examples(train, options.max_length)
    return DataSplits(train, held_out, warnings, checksums)


def _read_encoded(
    data: str, split: str, options: TrainOptions, encoder: Encoder, checksums: dict[str, str]
) -> EncodedRows:
    """Read and encode one data set, and add the checksum of its rows to `checksums`."""
    rows = read_rows(data, split)
    checksum = xxh3_64()

    def rows_with_checksum() -> Iterator[Row]:
        for row in rows:
            checksum.update(json.dumps(row, default=str).encode())
            yield row

    try:
        encoded = encoder(rows_with_checksum())
        if options.too_long == "refuse":
            _refuse_long_rows(encoded, options.max_length)
    except DataError as error:
        raise DataError(f"{data}: {error}") from error
    checksums[f"{data} ({split})" if data in checksums else data] = checksum.hexdigest()
    return encoded


def _is_truncated(row: Example | None) -> bool:
    return row is not None and row.length > len(row.input_ids)


def _refuse_long_rows(rows: EncodedRows, max_length: int) -> None:
    for number, row in enumerate(rows, start=1):
        if row is None:
            reason = "has no token in the loss within"
        elif _is_truncated(row):
            reason = f"has {row.length} tokens, more than"
        else:
            continue
        raise DataError(
            f"row {number} {reason} max_length {max_length}: "
            "give a larger max_length, or set too_long to cut or drop"
        )


def _row_warnings(data: str, rows: EncodedRows, options: TrainOptions) -> Iterator[str]:
    truncated = [
        (number, row) for number, row in enumerate(rows, start=1) if row is not None and _is_truncated(row)
    ]
    if truncated:
        number, row = truncated[0]
        what = "left out" if options.too_long == "drop" else "cut"
        yield (
            f"{data}: {len(truncated)} of {len(rows)} rows are longer than max_length {options.max_length} "
            f"and are {what}; the first is row {number} with {row.length} tokens"
        )
    empty = [number for number, row in enumerate(rows, start=1) if row is None]
    if empty:
        yield (
            f"{data}: {len(empty)} of {len(rows)} rows are left out, because they have no token in the loss "
            f"within max_length {options.max_length}; the first is row {empty[0]}"
        )


def _usable_examples(rows: EncodedRows, data: str, part: str, options: TrainOptions) -> list[Example]:
    drops_long = options.too_long == "drop"
    usable = [row for row in rows if row is not None and not (drops_long and _is_truncated(row))]
    if not usable:
        raise DataError(
            f"{data}: none of the {len(rows)} {part} rows has a response within max_length "
            f"{options.max_length}: give a larger max_length"
        )
    return usable
