"""Rows of training data, from a file or the Hub, by Hugging Face's `datasets`."""

import csv
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from svdconvert.errors import DataError
from svdconvert.hub.auth import find_token
from svdconvert.training.data.prompts import Row

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""The readers of `datasets` by the ending of a file."""

# ORG/NAME or NAME, and a configuration behind a colon.
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.+-]+)?")


def read_rows(data: str, split: str = "train") -> Iterable[Row]:
    """The rows of a .jsonl, .json (a list or lines), .parquet, .csv or .tsv file, or of a split on the Hub.

    A path wins over a Hub id of the same name. Raises DataError where it is neither, or has no rows.
    """
    path = Path(data)
    if path.suffix in READERS or path.exists():
        rows = _read_file(path, split)
    elif HUB_ID.fullmatch(data):
        rows = _read_hub(data, split)
    else:
        raise DataError(f"{data}: there is no such file, and it is no Hub data set ORG/NAME either")
    if len(rows) == 0:
        raise DataError(f"{data}: it has no rows")
    return cast(Iterable[Row], rows)


def _read_file(path: Path, split: str) -> Any:
    if not path.is_file():
        raise DataError(
            f"{path}: {'a directory, give a file in it' if path.is_dir() else 'there is no such file'}"
        )
    if path.suffix not in READERS:
        raise DataError(f"{path}: the ending {path.suffix!r} is not one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    # A file is the split that is asked for, so that a slice of it can be.
    files = {split.partition("[")[0]: str(path)}
    with tempfile.TemporaryDirectory() as cache:
        # In memory, as its tokens will be: nothing of a local file is to stay in the user's cache.
        options = {"split": split, "data_files": files, "cache_dir": cache, "keep_in_memory": True}
        if READERS[path.suffix] == "csv":
            options |= _columns_as_text(path)
        try:
            return _load(str(path), READERS[path.suffix], **options)
        except DataError:
            if path.suffix == ".jsonl":
                _check_lines(path)
            raise


def _check_lines(path: Path) -> None:
    """Name the first line that is no JSON; `datasets` counts from 0, anew in every block it reads."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line.strip() or b"{}")
            except ValueError as error:
                raise DataError(f"{path}: row {number} is not JSON: {error}") from error


def _columns_as_text(path: Path) -> dict[str, Any]:
    """CSV knows no types: without these options 072 would arrive as the number 72, and None as nothing."""
    from datasets import Features, Value

    # GLUE's .tsv files have lone quotation marks in their texts: no quoting there.
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        header = next(csv.reader(lines, **style))
    return style | {
        "features": Features({column: Value("string") for column in header}),
        "keep_default_na": False,
    }


def _read_hub(data: str, split: str) -> Any:
    name, _, config = data.partition(":")
    return _load(
        f"{data}, taken for a Hub data set", name, name=config or None, split=split, token=find_token()
    )


def _load(shown: str, *args: Any, **options: Any) -> Any:
    """datasets.load_dataset, silent, with its failures as a DataError about `shown`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        with _silent():
            return load_dataset(*args, **options)
    except (DatasetsError, ValueError, OSError) as error:
        # A DatasetGenerationError says only that the reading failed; its cause says why.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split())
        # What `datasets` says of an empty list and of the like.
        reason = "it has no rows" if "corresponds to no data" in reason else reason
        raise DataError(f"{shown}: {reason}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without bars, and without the log of what becomes our own sentence."""
    import logging

    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled, logger = are_progress_bars_disabled(), logging.getLogger("datasets")
    level = logger.level
    disable_progress_bars()
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        if not disabled:
            enable_progress_bars()
