"""The rows of a task: from its data set on the Hub, or from a file with the same fields."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from svdconvert.errors import DataError
from svdconvert.evaluation.base import DataSource, Record, Row, Task
from svdconvert.manifest.evaluations import EvaluatedData
from svdconvert.training.data.rows import is_file, read_rows


@dataclass(frozen=True)
class Questions:
    """What a model is asked."""

    task: Task
    rows: Sequence[Row]
    data: EvaluatedData
    is_cut: bool
    """True if the limit left rows out."""

    @property
    def idle_limit(self) -> str | None:
        """A sentence about a limit that left nothing out; None if there is no limit, or if it did."""
        limit = self.data.limit
        if limit is None or self.is_cut:
            return None
        return f"`limit` {limit} changes nothing for {self.task.name}: {self.data.name} has no more rows"


def read_questions(task: Task, data: str | None, limit: int | None) -> Questions:
    """The first `limit` rows of a task, or all; `data` is a file or a data set instead of the task's own.

    Raises DataError if they cannot be read, or do not have the task's fields.
    """
    source = task.data if data is None else _given(data, task.data)
    records = list(islice(_records(source), None if limit is None else limit + 1))
    is_cut = limit is not None and len(records) > limit
    records = records[:limit]
    try:
        rows = task.rows(records)
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from error
    if len({row.id for row in rows}) < len(rows):
        raise DataError(f"{source.name}: two rows have the same id; remove one")
    return Questions(task, rows, _described(source, records, len(rows), limit), is_cut)


def _given(data: str, usual: DataSource) -> DataSource:
    """The data set that the user named, with the task's split."""
    if is_file(data):
        return DataSource(name=data, split="train")
    name, _, config = data.partition(":")
    return DataSource(name=name, configs=(config or None,), split=usual.split)


def _records(source: DataSource) -> Iterator[Record]:
    names = [f"{source.name}:{config}" if config else source.name for config in source.configs]
    return chain.from_iterable(read_rows(name, source.split, source.revision) for name in names)


def _described(source: DataSource, records: Sequence[Record], rows: int, limit: int | None) -> EvaluatedData:
    total = hashlib.sha256()
    for record in records:
        total.update(json.dumps(dict(record), sort_keys=True, default=str).encode() + b"\n")
    of_file = is_file(source.name)
    configs = [config for config in source.configs if config]
    return EvaluatedData(
        name=Path(source.name).name if of_file else source.name,
        config=",".join(configs) or None,
        split=None if of_file else source.split,
        revision=source.revision,
        sha256=total.hexdigest(),
        rows=rows,
        limit=limit,
    )
