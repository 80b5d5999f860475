"""Rows become training and held-out examples, and rows that are cut or left out are reported."""

from pathlib import Path
from typing import Any

import pytest

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.data.dataset import read_dataset as read_with_encoder
from svdconvert.training.data.encode import TextRowEncoder
from tests.training.data.test_rows import ROWS, write
from tests.training.encoding import learned


def read_dataset(options: TrainOptions, tokenizer: Any) -> DataSplits:
    return read_with_encoder(options, TextRowEncoder(tokenizer, options))


def test_the_last_rows_are_held_out(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    loaded = read_dataset(TrainOptions(data=data, eval_rows=2, template="none"), tokenizer)
    assert [learned(example, tokenizer) for example in loaded.train] == ["0</s>", "1</s>", "2</s>"]
    assert [learned(example, tokenizer) for example in loaded.held_out] == ["3</s>", "4</s>"]
    assert loaded.warnings == []


def test_all_rows_of_a_separate_file_are_held_out(tmp_path: Path, tokenizer: Any) -> None:
    data, eval_data = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [{"text": "abc"}])
    options = TrainOptions(data=data, eval_data=eval_data, template="none")
    loaded = read_dataset(options, tokenizer)
    assert (len(loaded.train), len(loaded.held_out)) == (5, 1)


LONG = {"question": "a long question", "answer": "5"}


def test_rows_without_a_token_in_the_loss_are_left_out_with_a_warning(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [*ROWS, LONG])
    loaded = read_dataset(TrainOptions(data=data, template="none", max_length=8), tokenizer)
    assert len(loaded.train) == 5
    (warning,) = loaded.warnings
    reason = "because they have no token in the loss within `max_length` 8; the first is row 6"
    assert warning == f"{data}: 1 of 6 rows are left out, {reason}"


@pytest.mark.parametrize(("too_long", "left", "word"), [("cut", 6, "cut"), ("drop", 5, "left out")])
def test_rows_that_are_too_long_are_cut_or_left_out_with_a_warning(
    too_long: Any, left: int, word: str, tmp_path: Path, tokenizer: Any
) -> None:
    data = write(tmp_path / "rows.jsonl", [*ROWS[:2], {"question": "q", "answer": "0123456789"}, *ROWS[2:]])
    options = TrainOptions(data=data, template="none", max_length=8, too_long=too_long)
    loaded = read_dataset(options, tokenizer)
    assert len(loaded.train) == left
    (warning,) = loaded.warnings
    said = f"1 of 6 rows are longer than `max_length` 8 and are {word}; the first is row 3 with 13 tokens"
    assert warning == f"{data}: {said}"


def test_rows_that_are_too_long_can_be_refused(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [*ROWS, {"question": "q", "answer": "0123456789"}])
    options = TrainOptions(data=data, template="none", max_length=8, too_long="refuse")
    with pytest.raises(DataError, match=r"rows.jsonl: row 6 has 13 tokens, more than `max_length` 8: give"):
        read_dataset(options, tokenizer)


def test_data_without_a_usable_row_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(
        DataError,
        match="rows.jsonl: none of the 5 training rows has a token in the loss within `max_length` 8",
    ):
        read_dataset(TrainOptions(data=data, max_length=8), tokenizer)


def test_holding_out_everything_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="`eval_rows` holds out 5 of its 5 rows"):
        read_dataset(TrainOptions(data=data, eval_rows=5), tokenizer)


def test_no_data_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        read_dataset(TrainOptions(), tokenizer)


def test_an_error_in_a_row_also_names_the_file(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [*ROWS, {"question": "q"}])
    with pytest.raises(DataError, match=r"rows.jsonl: row 6: it has no answer"):
        read_dataset(TrainOptions(data=data), tokenizer)
