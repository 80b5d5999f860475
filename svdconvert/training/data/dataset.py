"""Rows as a model reads them: which are trained on, which are held out, and what is to be said of them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xxhash import xxh3_64

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.example import Example
from svdconvert.training.data.packing import pack
from svdconvert.training.data.prompts import Row
from svdconvert.training.data.rows import read_rows

Encoded = Sequence[Example | None]
"""An entry a row; None where nothing of it can be learnt."""
Encode = Callable[[Iterable[Row]], Encoded]
"""Raises DataError, which names the row, where one cannot be used."""


@dataclass(frozen=True, slots=True)
class DataSplits:
    """What a plan trains on."""

    train: Sequence[Example]
    held_out: Sequence[Example] = ()
    remarks: Sequence[str] = ()
    """A sentence about every kind of row that is not trained on as it is."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """Checksum of all rows as read, by the name of the data."""


def read_dataset(plan: TrainOptions, encode: Encode) -> DataSplits:
    """Read and encode all that the plan names. Raises DataError where something cannot be used."""
    if plan.data is None:
        raise DataError("there is nothing to train on: give data a file or a Hub data set")
    remarks: list[str] = []
    marks: dict[str, str] = {}
    rows = _encoded(plan.data, plan.split, plan, encode, marks)
    remarks += _remarks(plan.data, rows, plan)
    if plan.eval_data is not None:
        held_out = _encoded(plan.eval_data, plan.eval_split or plan.split, plan, encode, marks)
        remarks += _remarks(plan.eval_data, held_out, plan)
    else:
        cut = len(rows) - plan.eval_rows
        if cut <= 0:
            raise DataError(f"{plan.data}: eval_rows holds out {plan.eval_rows} of its {len(rows)} rows")
        rows, held_out = rows[:cut], rows[cut:]
    train = _kept(rows, plan.data, "training", plan)
    tested = _kept(held_out, plan.eval_data or plan.data, "held-out", plan) if held_out else []
    return DataSplits(pack(train, plan.max_length) if plan.packing else train, tested, remarks, marks)


def _encoded(data: str, split: str, plan: TrainOptions, encode: Encode, marks: dict[str, str]) -> Encoded:
    found, mark = read_rows(data, split), xxh3_64()

    def marked() -> Iterator[Row]:
        for row in found:
            mark.update(json.dumps(row, default=str).encode())
            yield row

    try:
        rows = encode(marked())
        if plan.too_long == "refuse":
            _refuse_long(rows, plan.max_length)
    except DataError as error:
        raise DataError(f"{data}: {error}") from error
    marks[f"{data} ({split})" if data in marks else data] = mark.hexdigest()
    return rows


def _is_long(row: Example | None) -> bool:
    return row is not None and row.length > len(row.input_ids)


def _refuse_long(rows: Encoded, max_length: int) -> None:
    for number, row in enumerate(rows, start=1):
        if row is None or _is_long(row):
            what = f"{row.length} tokens" if row else "nothing to learn"
            raise DataError(
                f"row {number} has {what} within max_length {max_length}: "
                "give a larger max_length, or too_long cut or drop"
            )


def _remarks(data: str, rows: Encoded, plan: TrainOptions) -> Iterator[str]:
    long = [number for number, row in enumerate(rows, start=1) if _is_long(row)]
    if long:
        first = rows[long[0] - 1]
        what = "left out" if plan.too_long == "drop" else "cut"
        yield (
            f"{data}: {len(long)} of {len(rows)} rows are longer than max_length {plan.max_length} and are "
            f"{what}; the first is row {long[0]} with {first.length if first else 0} tokens"
        )
    empty = [number for number, row in enumerate(rows, start=1) if row is None]
    if empty:
        yield (
            f"{data}: {len(empty)} of {len(rows)} rows are left out, with nothing to learn within "
            f"max_length {plan.max_length}; the first is row {empty[0]}"
        )


def _kept(rows: Encoded, data: str, part: str, plan: TrainOptions) -> list[Example]:
    kept = [row for row in rows if row is not None and not (plan.too_long == "drop" and _is_long(row))]
    if not kept:
        raise DataError(
            f"{data}: not one of the {len(rows)} {part} rows has a response within max_length "
            f"{plan.max_length}: give a larger one"
        )
    return kept
