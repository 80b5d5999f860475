"""Exactly the tokens of the response and the end of the sequence are in the loss."""

from typing import Any

import pytest

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.encode import TextRowEncoder
from svdconvert.training.data.example import IGNORED
from tests.training.encoding import PLAIN, learned, one, text


def test_the_prompt_is_not_in_the_loss_and_the_end_of_sequence_token_is(tokenizer: Any) -> None:
    example = one({"prompt": "ab", "completion": "cd"}, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, b, c, d = tokenizer.convert_tokens_to_ids(list("abcd"))
    assert example.input_ids.tolist() == [bos, a, b, c, d, eos]
    assert example.labels.tolist() == [IGNORED, IGNORED, IGNORED, c, d, eos]
    assert example.loss_tokens == 3


def test_a_text_without_a_prompt_is_in_the_loss_from_its_first_character(tokenizer: Any) -> None:
    example = one({"text": "abc"}, tokenizer)
    assert learned(example, tokenizer).endswith("abc</s>")
    assert example.loss_tokens == 4


@pytest.mark.parametrize("kind", ["tokenizer", "python_tokenizer"])
def test_a_token_across_the_boundary_counts_as_prompt(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    example = one({"prompt": "a:", "completion": "xy"}, tokenizer)
    joint, y = tokenizer.convert_tokens_to_ids([":x", "y"])
    assert example.input_ids.tolist()[2:4] == [joint, y]  # prompt and response were tokenised as one text
    assert example.labels.tolist() == [IGNORED, IGNORED, IGNORED, y, tokenizer.eos_token_id]


@pytest.mark.parametrize("row", [{"prompt": "a:b", "completion": "c:xd"}, {"text": "a:xb"}], ids=str)
def test_a_tokenizer_without_offsets_gives_the_same_rows(
    row: dict[str, str], tokenizer: Any, python_tokenizer: Any
) -> None:
    assert not python_tokenizer.is_fast
    fast, slow = one(row, tokenizer), one(row, python_tokenizer)
    assert fast.input_ids.tolist() == slow.input_ids.tolist()
    # Nothing predicts the first token, so its label does not matter.
    assert fast.labels.tolist()[1:] == slow.labels.tolist()[1:]


def test_a_tokenizer_that_appends_the_end_token_itself_gets_no_second_one(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    example = one({"prompt": "a", "completion": "b"}, tokenizer)
    assert text(example, tokenizer) == "<s>ab</s>"
    assert learned(example, tokenizer) == "b</s>"


def test_a_template_that_writes_the_bos_token_gets_no_second_one(tokenizer: Any) -> None:
    options = TrainOptions(template="<s>[{prompt}]")
    assert text(one({"prompt": "a", "completion": "b"}, tokenizer, options), tokenizer) == "<s>[a]b</s>"


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        TextRowEncoder(tokenizer, PLAIN)([{"text": "a"}])


def test_a_truncated_response_has_no_end_token_in_the_loss(tokenizer: Any) -> None:
    options = TrainOptions(template="none", max_length=4)
    example = one({"prompt": "a", "completion": "bcdef"}, tokenizer, options)
    assert text(example, tokenizer) == "<s>abc"
    assert learned(example, tokenizer) == "bc"


def test_a_row_without_a_token_in_the_loss_is_encoded_as_none(tokenizer: Any) -> None:
    rows = [
        {"prompt": "abcde", "completion": "f"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "f"},
    ]
    first, second, third = TextRowEncoder(tokenizer, TrainOptions(template="none", max_length=6))(rows)
    assert first is None
    assert second is None
    assert third is not None
