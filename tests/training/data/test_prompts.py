"""Which fields of a row are used, how a prompt is formatted, and which turns of a chat are in the loss."""

from typing import Any

import pytest

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.encode import TextRowEncoder
from svdconvert.training.data.example import IGNORED
from svdconvert.training.data.prompts import ALPACA, ALPACA_WITH_INPUT, format_prompt
from tests.training.encoding import PLAIN, learned, one, text


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "1+1?", "answer": "2", "id": "7"}, ALPACA),
        ({"instruction": "1+1?", "output": "2"}, ALPACA),
        ({"instruction": "1+1?", "input": "", "output": "2"}, ALPACA),
        ({"instruction": "1+1?", "input": None, "output": "2"}, ALPACA),
        ({"query": "1+1?", "response": "2", "original_question": "no"}, ALPACA),
        ({"prompt": "1+1?", "completion": "2"}, "{prompt}"),
        ({"instruction": "1+1?", "input": "", "output": "2", "answer": "no"}, ALPACA),
        ({"instruction": "1+1?", "output": "2", "text": "no"}, ALPACA),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, dict) else "",
)
def test_known_fields_are_found_by_name(row: dict[str, Any], prompt: str, tokenizer: Any) -> None:
    example = one(row, tokenizer, TrainOptions())
    assert text(example, tokenizer) == "<s>" + prompt.replace("{prompt}", "1+1?") + "2</s>"
    assert learned(example, tokenizer) == "2</s>"


def test_an_input_gets_the_heading_of_alpaca(tokenizer: Any) -> None:
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    before = ALPACA_WITH_INPUT.replace("{prompt}", "Add.\n\n### Input:\n1 1")
    assert text(one(row, tokenizer, TrainOptions()), tokenizer) == f"<s>{before}2</s>"
    assert (
        text(one(row, tokenizer, TrainOptions(template="Q {prompt} A ")), tokenizer)
        == "<s>Q Add.\n\n1 1 A 2</s>"
    )


def test_fields_can_be_named_in_the_options(tokenizer: Any) -> None:
    options = TrainOptions(prompt_field="ask", response_field="say", template="none")
    row = {"ask": "a", "say": "b", "question": "no", "answer": "no"}
    assert text(one(row, tokenizer, options), tokenizer) == "<s>ab</s>"


def test_a_missing_field_is_named_with_the_most_similar_one(tokenizer: Any) -> None:
    options = TrainOptions(prompt_field="question", response_field="anser")
    with pytest.raises(DataError, match=r"row 1: there is no field anser.*did you mean answer\?"):
        TextRowEncoder(tokenizer, options)([{"question": "a", "answer": "b"}])


def test_a_row_with_unknown_fields_only_is_refused_with_the_known_ones(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="question/answer.* fields foo, bar: name yours with `prompt_field`"):
        TextRowEncoder(tokenizer, PLAIN)([{"foo": "a", "bar": "b"}])


def test_a_row_that_lacks_a_field_is_named_with_the_fields_it_has(tokenizer: Any) -> None:
    rows = [{"question": "a", "answer": "b", "id": "1"}, {"question": "a", "answer": None, "id": "2"}]
    with pytest.raises(DataError, match="row 2: it has no answer; its fields are question, id"):
        TextRowEncoder(tokenizer, PLAIN)(rows)


def test_a_field_that_is_not_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1: its answer is not text but int"):
        TextRowEncoder(tokenizer, PLAIN)([{"question": "a", "answer": 3}])


@pytest.mark.parametrize("template", [None, "none", "chat", "{not a field} {prompt}:"])
def test_format_prompt_gives_the_prompt_of_the_training_rows(template: str | None, tokenizer: Any) -> None:
    example = one({"question": "1+1?", "answer": "2"}, tokenizer, TrainOptions(template=template))
    masked = tokenizer.decode(example.input_ids[example.labels == IGNORED].tolist())
    prompt = format_prompt("1+1?", template, tokenizer)
    assert masked.removeprefix("<s>") == prompt.removeprefix("<s>")
    assert "1+1?" in prompt


def test_format_prompt_without_a_chat_template_says_so(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        format_prompt("a", "chat", tokenizer)


def test_a_template_without_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`template` is a text with \{prompt\}"):
        TrainOptions(template="Question: {question}")


def chat(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def test_every_answer_of_a_chat_and_its_end_marker_are_in_the_loss(tokenizer: Any) -> None:
    example = one(chat("hi", "ho", "ha", "he"), tokenizer)
    whole = "<s>[user]hi<end>\n[assistant]ho<end>\n[user]ha<end>\n[assistant]he<end>"
    assert text(example, tokenizer) == whole
    assert learned(example, tokenizer) == "ho<end>he<end>"


def test_an_assistant_turn_that_answers_nothing_is_not_in_the_loss(tokenizer: Any) -> None:
    greeting = {"messages": [{"role": "assistant", "content": "hello"}, *chat("hi", "ho")["messages"]]}
    example = one(greeting, tokenizer)
    assert "[assistant]hello<end>" in text(example, tokenizer)
    assert learned(example, tokenizer) == "ho<end>"


def test_a_chat_ends_with_its_last_answer(tokenizer: Any) -> None:
    assert text(one(chat("hi", "ho", "bye"), tokenizer), tokenizer).endswith("]ho<end>")


def test_a_chat_template_without_an_end_marker_gets_the_end_of_sequence_token(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learned(one(chat("hi", "ho"), tokenizer), tokenizer) == "ho</s>"


def test_an_answer_that_later_turns_change_is_not_in_the_loss(tokenizer: Any) -> None:
    # As Qwen3's template does: only the last turn keeps its thoughts.
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if loop.last and m.role == 'assistant' %}hm,{% endif %}{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert learned(one(chat("hi", "ho", "ha", "he"), tokenizer), tokenizer) == "hm,he<end>"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (chat("hi"), "no answer of the assistant"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "no answer of the assistant"),
        ({"messages": "hi"}, "not a list of objects with role and content"),
        ({"messages": [{"content": "hi"}]}, "not a list of objects with role and content"),
    ],
)
def test_a_chat_without_an_answer_is_refused(row: dict[str, Any], complaint: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{complaint}"):
        TextRowEncoder(tokenizer, PLAIN)([row])


def test_an_error_of_the_chat_template_is_reported(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match="row 1: the chat template refuses its messages: roles must alternate"
    ):
        TextRowEncoder(tokenizer, PLAIN)([chat("hi", "ho")])
