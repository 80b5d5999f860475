"""Rows are read from every kind of file as they are, and errors name the file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from svdconvert.errors import DataError
from svdconvert.training.data import rows as reading
from svdconvert.training.data.rows import read_rows, row_text

ROWS = [{"question": f"q{n}", "answer": f"{n}"} for n in range(5)]


# What a reader that guesses types would take for a number, and for nothing.
TEXTS = [*ROWS, {"question": "q5", "answer": "072"}, {"question": "q6", "answer": "None"}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.stem == "list":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "list.json", "rows.parquet", "rows.csv"])
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    data = write(tmp_path / name, TEXTS)
    assert list(read_rows(data)) == TEXTS
    assert list(read_rows(data, "train[1:3]")) == TEXTS[1:3]
    assert list(read_rows(data, "test")) == TEXTS


def test_reading_creates_no_cache_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read_rows(write(tmp_path / "rows.jsonl", ROWS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("none.jsonl", None, "there is no such file"),
        ("sub dir/none", None, "there is no such file, and it is no Hub data set"),
        ("empty.jsonl", "", "the file is empty"),
        ("empty.json", "[]", "it has no rows"),
        ("rows.jsonl", '{"text": "a"}\n\n{"text":\n', r"rows.jsonl: row 3 is not JSON"),
        ("rows.txt", "a", r"the suffix '.txt' is not one of .jsonl, .json, .parquet, .csv"),
        ("broken.jsonl", '{"text": "a"}\n{"text": ', "broken.jsonl: .*JSON"),
        (".", None, "a directory, give a file in it"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(
    name: str, content: str | None, complaint: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=complaint) as raised:
        list(read_rows(str(tmp_path / name)))
    assert str(raised.value).startswith(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_a_loading_script_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "piqa.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(DataError, match=r"^piqa: it is a data set with a loading script.*Parquet") as raised:
        reading._load_dataset("piqa", str(tmp_path / "piqa"), split="train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, TypeError, KeyError, ImportError])
def test_every_error_of_the_reader_is_a_sentence(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def fail(*args: Any, **arguments: Any) -> None:
        raise error("two\nlines")

    data = write(tmp_path / "rows.jsonl", ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(DataError, match=r"rows\.jsonl: .*two.*lines"):
            read_rows(data)
    rows = read_rows(data)

    def rows_until_the_second(dataset: Dataset) -> Iterator[Any]:
        yield ROWS[0]
        fail()

    monkeypatch.setattr(Dataset, "__iter__", rows_until_the_second)
    with pytest.raises(DataError, match=r"rows\.jsonl: row 2 cannot be read: .*two"):
        list(rows)


@pytest.mark.parametrize("content", ["\ufeff", '"a' + "b" * 200_000 + '"\n1\n'], ids=["empty", "long"])
def test_a_header_that_cannot_be_read_is_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(DataError, match=r"rows\.csv: "):
        read_rows(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a,b\n1,2,3\n", "row 1 has 3 cells, and the first line names 2 columns"),
        ("a,b\n1,2\n\n4\n", "row 3 has 1 cells, and the first line names 2 columns"),
        ("a,a\n1,2\n", "its first line must name every column once; it names a, a"),
        ("a,b,\n1,2,\n", "its first line must name every column once"),
    ],
)
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_table_with_uneven_rows_is_refused(
    content: str, complaint: str, ending: str, tmp_path: Path
) -> None:
    """The reader of `datasets` takes the first column for row numbers if a row has one cell more."""
    path = tmp_path / f"rows{ending}"
    path.write_text(content.replace(",", "\t") if ending == ".tsv" else content)
    with pytest.raises(DataError, match=re.escape(complaint)):
        read_rows(str(path))


def test_a_cell_may_be_long_and_hold_commas_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('a,b\n"1,\n2",' + "x" * 200_000 + "\n\n3,\n")
    rows = [{"a": "1,\n2", "b": "x" * 200_000}, {"a": "3", "b": ""}]
    assert list(read_rows(str(tmp_path / "rows.csv"))) == rows


def test_the_text_of_a_row_does_not_depend_on_addresses() -> None:
    assert row_text({"image": object(), "a": b"x"}) == row_text({"image": object(), "a": b"x"})
    assert row_text({"a": b"x"}) != row_text({"a": b"y"})
