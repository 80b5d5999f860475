"""Published scores that fit a result: the same model, method and rank, and data of the same name."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from svdconvert.manifest.evaluations import PublishedScore

_FILE = Path(__file__).with_name("published.yaml")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Model(_Part):
    names: tuple[str, ...]
    without: tuple[str, ...]


class _Data(_Part):
    text: str
    names: tuple[str, ...]


class _Scores(_Part):
    model: str
    method: str
    rank: int | None = None
    """None for a method without a rank."""
    scores: tuple[float, ...]


class _Table(_Part):
    source: str
    data: str
    tasks: tuple[str, ...]
    rows: tuple[_Scores, ...]


class _File(_Part):
    models: Mapping[str, _Model]
    data: Mapping[str, _Data]
    scores: tuple[_Table, ...]


@cache
def _published() -> _File:
    return _File.model_validate(yaml.safe_load(_FILE.read_text(encoding="utf-8")))


def published_rows(
    task: str, model: str | None, method: str | None, rank: int | None, data: Sequence[str] = ()
) -> list[PublishedScore]:
    """The published scores of `task` for the same model, method and rank.

    `model` is the name of the base, such as meta-llama/Llama-2-7b-hf, and `data` are the names of the data
    that was trained on, if they are known. Empty if the model was not trained, or nothing fits.
    """
    if model is None or method is None:
        return []
    file = _published()
    found: list[PublishedScore] = []
    for table in file.scores:
        if task not in table.tasks or not _is_same_data(file.data[table.data], data):
            continue
        column = table.tasks.index(task)
        for row in table.rows:
            if row.method == method and row.rank in (rank, None) and _is_model(file.models[row.model], model):
                found.append(_score(row, column, table, file))
    return found


def _score(row: _Scores, column: int, table: _Table, file: _File) -> PublishedScore:
    return PublishedScore(
        score=round(row.scores[column] / 100, 6),
        model=row.model,
        method=row.method,
        rank=row.rank,
        data=file.data[table.data].text,
        source=table.source,
    )


def _is_model(known: _Model, name: str) -> bool:
    short = name.rpartition("/")[2].casefold().replace("_", "-")
    return any(part in short for part in known.names) and not any(part in short for part in known.without)


def _is_same_data(known: _Data, names: Sequence[str]) -> bool:
    return not names or any(part in name.casefold() for name in names for part in known.names)
