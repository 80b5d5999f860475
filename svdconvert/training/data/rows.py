"""Read rows of training data from a file or the Hub, with the `datasets` library, and find their fields."""

import csv
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, cast

from svdconvert.checkpoint.json_text import DEEPEST, depth, parse_json
from svdconvert.config.progress import report
from svdconvert.errors import DataError, brief, did_you_mean
from svdconvert.hub.auth import find_token
from svdconvert.hub.data_sets import fetch_data_files

Row = Mapping[str, Any]
FieldSet = tuple[str, ...]

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""File suffix -> the builder of `datasets` that reads it."""

_REPORTED = 64  # rows between two reports of progress

# ORG/NAME or NAME, and optionally a configuration after a colon.
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.+-]+)?")


def read_rows(data: str, split: str = "train", revision: str | None = None) -> Iterable[Row]:
    """The rows of a .jsonl, .json (a list or lines), .parquet, .csv or .tsv file, or of a Hub data set.

    An existing path takes precedence over a Hub id of the same name; `revision` is a commit of a data set.
    Raises DataError if `data` is neither, or has no rows.
    """
    path = Path(data)
    report("read rows", 0, name=data)
    require_rows(data)
    rows = _read_file(path, split) if is_file(data) else _read_hub(data, split, revision)
    if len(rows) == 0:
        raise DataError(f"{data}: it has no rows")
    return _iterate(data, cast(Iterable[Row], rows), len(rows))


def require_rows(data: str) -> None:
    """Raise DataError if `data` cannot be read: a file that is absent, empty or of another kind, or no name.

    Nothing is downloaded: a data set of the Hub may still be absent.
    """
    path = Path(data)
    if not is_file(data):
        if not HUB_ID.fullmatch(data):
            raise DataError(f"{data}: there is no such file, and it is no Hub data set ORG/NAME either")
        return
    if not path.is_file():
        reason = "it is a directory, give a file in it" if path.is_dir() else "there is no such file"
        raise DataError(f"{path}: {reason}")
    if path.suffix not in READERS:
        raise DataError(f"{path}: the suffix {path.suffix!r} is not one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")


def is_file(data: str) -> bool:
    """True if `data` names a file, False if it can only be a Hub data set."""
    return Path(data).suffix in READERS or Path(data).exists()


def refuse_split_of_files(option: str, split: str, data: Sequence[str]) -> None:
    """Raise DataError if `split` is not called train and all of `data` are files, which have no splits."""
    name = split.partition("[")[0]
    if name != "train" and data and all(is_file(one) for one in data):
        raise DataError(
            f"{option} {brief(split)} changes nothing: {data[0]} is a file, which has no splits; leave it "
            f"out, or take a part of the rows with {option} 'train[:1000]'"
        )


def _iterate(data: str, rows: Iterable[Row], count: int) -> Iterator[Row]:
    """The rows; an error of `datasets`, such as for an image without Pillow, becomes a DataError."""
    iterator = iter(rows)
    number = 0
    while True:
        if number % _REPORTED == 0:
            report("read rows", number, count, "rows", name=data)
        number += 1
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"{data}: row {number} cannot be read: {_reason(error)}") from error
        yield row


def without_nulls(value: Any) -> Any:
    """The value without the keys of objects that are null, at any depth.

    Arrow, in which `datasets` and Parquet keep rows, gives all objects of a column the same keys and fills up
    with nulls, which a chat template would print. Raises DataError for more than 127 levels.
    """
    if depth(value) > DEEPEST:
        raise DataError(f"its lists and objects are nested more than {DEEPEST} levels; remove such values")
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def find_fields(row: Row, named: FieldSet | None, known: Sequence[FieldSet], option_names: str) -> FieldSet:
    """The fields that the user named, else the first set of known fields that the row has.

    `option_names` are the options that name fields, for the error message. Raises DataError if the row lacks
    a named field, or has no known set.
    """
    if named is not None:
        for field in named:
            if field not in row:
                raise DataError(f"there is no field {field}; {did_you_mean(field, row)}")
        return named
    # A field that is null in this row was added by Arrow for other rows, so it comes last.
    for names in (has_values(row), row):
        for fields in known:
            if all(field in names for field in fields):
                return fields
    sets = ", ".join("/".join(fields) for fields in known)
    raise DataError(
        f"none of the known field sets ({sets}) is among the fields {', '.join(row)}: "
        f"name yours with {option_names}"
    )


def has_values(row: Row) -> list[str]:
    """The fields of a row that hold something."""
    return [name for name, value in row.items() if value not in (None, "", [], {})]


def valid_text(text: str) -> str:
    """The text itself. Raises DataError if it holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"its text holds half of a character ({error.object[error.start]!r})") from error
    return text


def row_text(row: Row) -> str:
    """A row as text that is the same in every process, for a checksum."""
    return json.dumps(row, default=_value_text)


def _value_text(value: Any) -> str:
    # The text of other objects, such as images, contains their address in memory.
    is_plain = isinstance(value, bytes | date | time | timedelta | Decimal)
    return str(value) if is_plain else type(value).__name__


def _read_file(path: Path, split: str) -> Any:
    with tempfile.TemporaryDirectory() as cache:
        # `datasets` would take [, * and $ in a path for a pattern or a variable.
        link = Path(cache) / f"rows{path.suffix}"
        link.symlink_to(path.resolve())
        # The file gets the name of the requested split, so that a slice of that split can be requested too.
        files = {split.partition("[")[0]: str(link)}
        # Rows are kept in memory: a local file must leave nothing in the user's cache of data sets.
        arguments = {"split": split, "data_files": files, "cache_dir": cache, "keep_in_memory": True}
        try:
            if READERS[path.suffix] == "csv":
                arguments |= _csv_arguments(path)
            return _load_dataset(str(path), READERS[path.suffix], **arguments)
        except DataError as error:
            if path.suffix == ".jsonl":
                _raise_for_invalid_line(path)
            raise DataError(str(error).replace(str(link), str(path))) from error.__cause__


def _raise_for_invalid_line(path: Path) -> None:
    """Raise DataError for the first invalid line; the row numbers of `datasets` restart with every block."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                parse_json(line.strip() or b"{}")
            except ValueError as error:
                raise DataError(f"{path}: row {number} is not JSON: {error}") from error


def _csv_arguments(path: Path) -> dict[str, Any]:
    """Arguments that read every column as text: type inference would turn 072 into 72 and None into null."""
    from datasets import Features, Value

    style: dict[str, Any] = {}
    if path.suffix == ".tsv":
        # The .tsv files of GLUE have unbalanced quotation marks in their texts, so quoting must be off.
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        try:
            header = next(csv.reader(lines, **style), [])
        except csv.Error as error:
            raise DataError(f"{path}: row 1: {error}") from error
    if not header:
        raise DataError(f"{path}: its first line names no column; begin the file with the names")
    _refuse_uneven_rows(path, header, style)
    return style | {
        "features": Features({column: Value("string") for column in header}),
        "keep_default_na": False,
    }


def _refuse_uneven_rows(path: Path, header: list[str], style: Mapping[str, Any]) -> None:
    """Raise DataError if the columns have no names of their own, or a row has another number of cells.

    With one cell more, the reader of `datasets` would take the first column for row numbers; a missing cell
    would be an empty text.
    """
    if len({*header}) < len(header) or "" in header:
        raise DataError(f"{path}: its first line must name every column once; it names {', '.join(header)}")
    before = csv.field_size_limit(1 << 30)
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
            for number, cells in enumerate(csv.reader(lines, **style)):
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"{path}: row {number} has {len(cells)} cells, and the first line names "
                        f"{len(header)} columns; put texts with the separator in them into quotation marks"
                    )
    except csv.Error as error:
        raise DataError(f"{path}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _read_hub(data: str, split: str, revision: str | None) -> Any:
    from datasets import load_dataset_builder

    name, _, config = data.partition(":")

    def load() -> Any:
        """What load_dataset does, with the progress of the download."""
        builder = load_dataset_builder(name, config or None, revision=revision, token=find_token())
        if not Path(builder.cache_dir).exists():
            files = builder.config.data_files or {}
            fetch_data_files(data, chain.from_iterable(files[part] for part in files))
            report("read rows", 0, name=data)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)

    return _rows_of(f"{data}, taken for a Hub data set", load)


def _load_dataset(description: str, *args: Any, **arguments: Any) -> Any:
    """datasets.load_dataset without output; its errors become a DataError that starts with `description`."""
    from datasets import load_dataset

    return _rows_of(description, lambda: load_dataset(*args, **arguments))


def _rows_of(description: str, load: Callable[[], Any]) -> Any:
    try:
        with _datasets_silenced():
            return _with_encoded_images(load())
    except Exception as error:  # the readers of `datasets` raise errors of many libraries
        raise DataError(f"{description}: {_reason(error)}") from error


def _with_encoded_images(rows: Any) -> Any:
    """The data set with images as files in bytes: they are checked and decoded when they are needed."""
    from datasets import Features

    features = getattr(rows, "features", None)
    if not features:
        return rows
    encoded = {name: _without_decoding(feature) for name, feature in features.items()}
    return rows if encoded == dict(features) else rows.cast(Features(encoded), keep_in_memory=True)


def _without_decoding(feature: Any) -> Any:
    from datasets import Image, LargeList, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List | LargeList):
        return type(feature)(_without_decoding(feature.feature))
    if isinstance(feature, dict):
        return {name: _without_decoding(inner) for name, inner in feature.items()}
    return feature


def _reason(error: Exception) -> str:
    """What went wrong, in one sentence."""
    from datasets.exceptions import DatasetGenerationError

    # A DatasetGenerationError only says that reading failed; the reason is in its cause.
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
    reason = " ".join(str(cause or error).split()) or type(cause or error).__name__
    # The message of `datasets` for an empty list.
    if "corresponds to no data" in reason:
        return "it has no rows"
    if "scripts are no longer supported" in reason:
        return (
            "it is a data set with a loading script, which is never run; give one of its Parquet files "
            "(many data sets have them in the branch refs/convert/parquet)"
        )
    return reason


@contextmanager
def _datasets_silenced() -> Iterator[None]:
    """Suppress the progress bars of `datasets`, log messages that we raise as errors, and its counting.

    It reports each use of a reader, of local files too, to a server.
    """
    from datasets import are_progress_bars_disabled, config, disable_progress_bars, enable_progress_bars

    bars_were_disabled = are_progress_bars_disabled()
    logger = logging.getLogger("datasets")
    level = logger.level
    counts = config.HF_UPDATE_DOWNLOAD_COUNTS
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    disable_progress_bars()
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if not bars_were_disabled:
            enable_progress_bars()
