"""Rows from files of every kind: read as they are, held out, cut, packed, and complained of by name."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.data.dataset import read_dataset as load
from svdconvert.training.data.encode import collate, encode
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.data.packing import pack
from svdconvert.training.data.rows import read_rows
from tests.training.data.test_encode import learnt

ROWS = [{"question": f"q{n}", "answer": f"{n}"} for n in range(5)]
# What a reader that guesses types would take for a number, and for nothing.
TEXTS = [*ROWS, {"question": "q5", "answer": "072"}, {"question": "q6", "answer": "None"}]


def read_dataset(plan: TrainOptions, tokenizer: Any) -> DataSplits:
    return load(plan, partial(encode, tokenizer=tokenizer, plan=plan))


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


def test_reading_leaves_nothing_behind_and_shows_nothing(
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
        ("rows.txt", "a", r"the ending '.txt' is not one of .jsonl, .json, .parquet, .csv"),
        ("broken.jsonl", '{"text": "a"}\n{"text": ', "broken.jsonl: .*JSON"),
        (".", None, "a directory, give a file in it"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: str | None, complaint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=complaint) as raised:
        read_rows(str(tmp_path / name))
    assert str(raised.value).startswith(str(tmp_path / name))
    assert "\n" not in str(raised.value)


# --- all of it --------------------------------------------------------------------------------------------


def test_the_last_rows_are_held_out(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    loaded = read_dataset(TrainOptions(data=data, eval_rows=2, template="none"), tokenizer)
    assert [learnt(example, tokenizer) for example in loaded.train] == ["0</s>", "1</s>", "2</s>"]
    assert [learnt(example, tokenizer) for example in loaded.held_out] == ["3</s>", "4</s>"]
    assert loaded.remarks == []


def test_a_file_of_its_own_is_held_out_whole(tmp_path: Path, tokenizer: Any) -> None:
    data, eval_data = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [{"text": "abc"}])
    plan = TrainOptions(data=data, eval_data=eval_data, eval_rows=2, template="none")
    loaded = read_dataset(plan, tokenizer)
    assert (len(loaded.train), len(loaded.held_out)) == (5, 1)


LONG = {"question": "a long question", "answer": "5"}


def test_rows_without_anything_to_learn_are_left_out_and_named(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [*ROWS, LONG])
    loaded = read_dataset(TrainOptions(data=data, template="none", max_length=8), tokenizer)
    assert len(loaded.train) == 5
    (remark,) = loaded.remarks
    said = "1 of 6 rows are left out, with nothing to learn within max_length 8; the first is row 6"
    assert remark == f"{data}: {said}"


@pytest.mark.parametrize(("too_long", "left", "word"), [("cut", 6, "cut"), ("drop", 5, "left out")])
def test_rows_that_are_too_long_are_cut_or_left_out_and_named(
    too_long: Any, left: int, word: str, tmp_path: Path, tokenizer: Any
) -> None:
    data = write(tmp_path / "rows.jsonl", [*ROWS[:2], {"question": "q", "answer": "0123456789"}, *ROWS[2:]])
    plan = TrainOptions(data=data, template="none", max_length=8, too_long=too_long)
    loaded = read_dataset(plan, tokenizer)
    assert len(loaded.train) == left
    (remark,) = loaded.remarks
    said = f"1 of 6 rows are longer than max_length 8 and are {word}; the first is row 3 with 13 tokens"
    assert remark == f"{data}: {said}"


def test_rows_that_are_too_long_can_be_refused(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [*ROWS, {"question": "q", "answer": "0123456789"}])
    plan = TrainOptions(data=data, template="none", max_length=8, too_long="refuse")
    with pytest.raises(DataError, match=r"rows.jsonl: row 6 has 13 tokens within max_length 8: give"):
        read_dataset(plan, tokenizer)


# --- packing ----------------------------------------------------------------------------------------------


def rows_of(*lengths: int) -> list[Example]:
    ids = [torch.full((length,), length, dtype=torch.int32) for length in lengths]
    return [Example(row, row.clone(), len(row)) for row in ids]


def test_packing_fills_rows_and_loses_none() -> None:
    packs = pack(rows_of(3, 8, 5, 2, 4, 10), 10)
    assert [row.input_ids.tolist() for row in packs] == [
        [10] * 10,
        [8] * 8 + [2] * 2,
        [5] * 5 + [4] * 4,
        [3] * 3,
    ]
    assert [row.starts for row in packs] == [(0,), (0, 8), (0, 5), (0,)]


def test_the_first_token_of_a_packed_row_is_not_in_the_loss() -> None:
    (packed,) = pack(rows_of(3, 2), 10)
    assert packed.labels.tolist() == [IGNORED, 3, 3, IGNORED, 2]
    assert packed.loss_tokens == sum(row.loss_tokens for row in rows_of(3, 2))


def test_positions_begin_anew_in_every_packed_row_and_in_the_padding() -> None:
    batch = collate([*pack(rows_of(3, 2), 10), *rows_of(7)], pad_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert "position_ids" not in collate(rows_of(7, 2), pad_id=0)


def test_data_of_which_nothing_is_left_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(
        DataError, match="rows.jsonl: not one of the 5 training rows has a response within max_length 8"
    ):
        read_dataset(TrainOptions(data=data, max_length=8), tokenizer)


def test_holding_out_everything_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="eval_rows holds out 5 of its 5 rows"):
        read_dataset(TrainOptions(data=data, eval_rows=5), tokenizer)


def test_no_data_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        read_dataset(TrainOptions(), tokenizer)


def test_an_error_in_a_row_names_the_file_too(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [*ROWS, {"question": "q"}])
    with pytest.raises(DataError, match=r"rows.jsonl: row 6: it has no answer"):
        read_dataset(TrainOptions(data=data), tokenizer)
