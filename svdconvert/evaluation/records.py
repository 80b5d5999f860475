"""Read fields of records: the rows of a data set as they are published."""

from collections.abc import Callable, Sequence

from svdconvert.errors import DataError, brief
from svdconvert.evaluation.base import Record, Row

RowReader = Callable[[int, Record], Row]
"""(number of the record from 0, record) -> row. Raises DataError, which need not name the record."""


def read_each(records: Sequence[Record], read: RowReader) -> list[Row]:
    """One row for each record. Raises DataError, which names the record that cannot be used."""
    rows: list[Row] = []
    for number, record in enumerate(records):
        try:
            rows.append(read(number, record))
        except (DataError, ValueError) as error:
            raise DataError(f"row {number + 1}: {error}") from error
    return rows


def text_of(record: Record, *names: str) -> str:
    """The text in the first of these fields that the record has. Raises DataError if it has none of them."""
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"its {name} is {brief(value)}, which is not a text")
        return value
    raise DataError(f"it has no {' or '.join(names)}; its fields are {brief(', '.join(map(str, record)))}")


def texts_of(record: Record, name: str) -> list[str]:
    """A list of texts. Raises DataError if the field holds anything else."""
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise DataError(f"its {name} is {brief(value)}, which is not a list of texts")
    return list(value)


def index_of(record: Record, name: str, count: int, *, first: int = 0) -> int:
    """A number from `first` to first + count - 1, given as an integer or as text, counted from 0.

    Raises DataError if the field holds anything else, as the rows of a test set without answers do.
    """
    value = record.get(name)
    if isinstance(value, str) and len(value) <= 3 and value.isdecimal():
        value = int(value)
    if isinstance(value, bool):
        value = int(value)
    if not isinstance(value, int) or not 0 <= value - first < count:
        raise DataError(f"its {name} is {brief(value)}, which is not one of {first} to {first + count - 1}")
    return value - first
