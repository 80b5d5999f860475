"""Several data sets are mixed in the shares that were given, every row at least once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from svdconvert.config.recipe import to_cli_args
from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.data.dataset import read_dataset as read_with_encoder
from svdconvert.training.data.encode import TextRowEncoder
from svdconvert.training.data.example import Example
from svdconvert.training.data.mixing import mix_examples, mixture_counts
from tests.training.data.test_rows import write
from tests.training.encoding import learned


def numbered(first: int, count: int) -> list[Example]:
    return [Example(torch.tensor([number]), torch.tensor([number])) for number in range(first, first + count)]


def numbers(examples: list[Example]) -> list[int]:
    return [int(example.input_ids) for example in examples]


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ((10, 10), (0.5, 0.5), [10, 10]),
        ((10, 10), (0.75, 0.25), [30, 10]),
        ((70, 3), (0.7, 0.3), [70, 30]),
        ((4, 4, 4), (0.5, 0.25, 0.25), [8, 4, 4]),
    ],
)
def test_a_pass_is_the_shortest_that_has_every_row_and_the_shares(
    sizes: tuple[int, ...], weights: tuple[float, ...], counts: list[int]
) -> None:
    assert mixture_counts(sizes, weights) == counts


def test_rows_of_a_small_data_set_repeat_equally_often_up_to_one() -> None:
    mixed = numbers(mix_examples([numbered(0, 70), numbered(100, 4)], (0.7, 0.3), seed=0))
    times = Counter(mixed)
    assert [times[number] for number in range(70)] == [1] * 70
    assert sorted(times[number] for number in range(100, 104)) == [7, 7, 8, 8]


def test_the_seed_decides_which_rows_repeat() -> None:
    sets = [numbered(0, 90), numbered(100, 20)]
    one, same, other = (numbers(mix_examples(sets, (0.75, 0.25), seed=seed)) for seed in (0, 0, 1))
    assert one == same and one != other and len(one) == len(other) == 120


def test_without_shares_every_row_is_taken_once() -> None:
    assert numbers(mix_examples([numbered(0, 3), numbered(10, 2)], None, seed=0)) == [0, 1, 2, 10, 11]


def test_a_share_that_repeats_rows_too_often_is_refused() -> None:
    with pytest.raises(DataError, match="repeat the 2 rows of data set 1 .* times"):
        mixture_counts((2, 100_000), (0.9, 0.1))


def read(options: TrainOptions, tokenizer: Any) -> DataSplits:
    return read_with_encoder(options, TextRowEncoder(tokenizer, options))


def test_each_data_set_has_its_own_fields_and_its_own_held_out_rows(tmp_path: Path, tokenizer: Any) -> None:
    one = write(tmp_path / "a.jsonl", [{"question": "1", "answer": str(n)} for n in range(4)])
    two = write(tmp_path / "b.jsonl", [{"text": "78"}, {"text": "9"}])
    options = TrainOptions(data=(one, two), data_weights="1,1", eval_rows=1, template="none")
    loaded = read(options, tokenizer)
    assert [learned(row, tokenizer) for row in loaded.train] == [
        "0</s>",
        "1</s>",
        "2</s>",
        *["<s>78</s>"] * 3,
    ]
    assert [learned(row, tokenizer) for row in loaded.held_out] == ["3</s>", "<s>9</s>"]
    assert list(loaded.checksums) == [one, two]
    takes = f"3 rows of {one} (it has 3) and 3 rows of {two} (it has 1)"
    assert loaded.warnings == [f"one pass over the mixture takes {takes}"]


def test_shares_are_divided_by_their_sum() -> None:
    options = TrainOptions(data=("a", "b"), data_weights="7, 3")
    assert options.data_weights == (0.7, 0.3)
    assert options.with_default_lr(1.0).data_weights == (0.7, 0.3)
    assert TrainOptions(data=["a"]).data == "a"


@pytest.mark.parametrize(
    ("data", "weights", "reason"),
    [
        (("a", "a"), None, "the same data set twice"),
        ("a", "1", "give `data` several times"),
        (("a", "b"), "1", "1 numbers for 2 data sets"),
        (("a", "b"), "1,0", "above 0"),
        (("a", "b"), "1,nan", "above 0"),
        (("a", "b"), "half", "one number for each"),
        ((), None, "no name"),
    ],
)
def test_a_mixture_that_is_not_clear_is_refused(data: Any, weights: Any, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TrainOptions(data=data, data_weights=weights)


def test_the_command_line_of_a_mixture_names_every_data_set() -> None:
    words = to_cli_args("train", {"data": ["org/a", "org/b"], "data_weights": [0.7, 0.3]})
    assert words == ["--data", "org/a", "--data", "org/b", "--data-weights", "0.7,0.3"]
