"""What of a row is trained on: exactly the response and the end of the sequence, and nothing by accident."""

from typing import Any

import pytest
import torch

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.encode import collate, encode, padding_id
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.data.prompts import ALPACA, ALPACA_WITH_INPUT, format_prompt

PLAIN = TrainOptions(template="none")


def one(row: dict[str, Any], tokenizer: Any, plan: TrainOptions = PLAIN) -> Example:
    (example,) = encode([row], tokenizer, plan)
    assert example is not None
    return example


def text(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.input_ids.tolist()))


def learnt(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.labels[example.labels != IGNORED].tolist()))


# --- which fields -----------------------------------------------------------------------------------------


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
def test_known_fields_are_found_unasked(row: dict[str, Any], prompt: str, tokenizer: Any) -> None:
    example = one(row, tokenizer, TrainOptions())
    assert text(example, tokenizer) == "<s>" + prompt.replace("{prompt}", "1+1?") + "2</s>"
    assert learnt(example, tokenizer) == "2</s>"


def test_an_input_gets_alpacas_own_headline(tokenizer: Any) -> None:
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    before = ALPACA_WITH_INPUT.replace("{prompt}", "Add.\n\n### Input:\n1 1")
    assert text(one(row, tokenizer, TrainOptions()), tokenizer) == f"<s>{before}2</s>"
    assert (
        text(one(row, tokenizer, TrainOptions(template="Q {prompt} A ")), tokenizer)
        == "<s>Q Add.\n\n1 1 A 2</s>"
    )


def test_a_text_is_learnt_from_its_first_character(tokenizer: Any) -> None:
    example = one({"text": "abc"}, tokenizer)
    assert learnt(example, tokenizer).endswith("abc</s>")
    assert example.loss_tokens == 4


def test_other_fields_can_be_named(tokenizer: Any) -> None:
    plan = TrainOptions(prompt_field="ask", response_field="say", template="none")
    row = {"ask": "a", "say": "b", "question": "no", "answer": "no"}
    assert text(one(row, tokenizer, plan), tokenizer) == "<s>ab</s>"


def test_a_named_field_that_is_not_there_is_named_with_its_neighbour(tokenizer: Any) -> None:
    plan = TrainOptions(prompt_field="question", response_field="anser")
    with pytest.raises(DataError, match=r"row 1: there is no field anser.*did you mean answer\?"):
        encode([{"question": "a", "answer": "b"}], tokenizer, plan)


def test_unknown_fields_are_listed_with_the_known_ones(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="question/answer.* fields foo, bar: name yours with prompt_field"):
        encode([{"foo": "a", "bar": "b"}], tokenizer, PLAIN)


def test_a_row_without_its_field_is_named_with_what_it_has(tokenizer: Any) -> None:
    rows = [{"question": "a", "answer": "b", "id": "1"}, {"question": "a", "answer": None, "id": "2"}]
    with pytest.raises(DataError, match="row 2: it has no answer; its fields are question, id"):
        encode(rows, tokenizer, PLAIN)


def test_a_field_that_is_not_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1: its answer is not text but int"):
        encode([{"question": "a", "answer": 3}], tokenizer, PLAIN)


# --- where the loss lies ----------------------------------------------------------------------------------


def test_the_prompt_is_not_in_the_loss_and_the_end_of_sequence_token_is(tokenizer: Any) -> None:
    example = one({"prompt": "ab", "completion": "cd"}, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, b, c, d = tokenizer.convert_tokens_to_ids(list("abcd"))
    assert example.input_ids.tolist() == [bos, a, b, c, d, eos]
    assert example.labels.tolist() == [IGNORED, IGNORED, IGNORED, c, d, eos]
    assert example.loss_tokens == 3


@pytest.mark.parametrize("kind", ["tokenizer", "python_tokenizer"])
def test_a_token_across_the_border_counts_as_prompt(kind: str, request: pytest.FixtureRequest) -> None:
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


def test_a_tokenizer_that_ends_sequences_itself_gets_no_second_end(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    example = one({"prompt": "a", "completion": "b"}, tokenizer)
    assert text(example, tokenizer) == "<s>ab</s>"
    assert learnt(example, tokenizer) == "b</s>"


def test_a_template_that_writes_the_first_token_gets_no_second_one(tokenizer: Any) -> None:
    plan = TrainOptions(template="<s>[{prompt}]")
    assert text(one({"prompt": "a", "completion": "b"}, tokenizer, plan), tokenizer) == "<s>[a]b</s>"


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode([{"text": "a"}], tokenizer, PLAIN)


# --- templates --------------------------------------------------------------------------------------------


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


def test_a_template_needs_a_place_for_the_prompt() -> None:
    with pytest.raises(ValueError, match=r"template is a text with \{prompt\}"):
        TrainOptions(template="Question: {question}")


# --- chats ------------------------------------------------------------------------------------------------


def chat(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def test_every_answer_of_a_chat_is_learnt_with_its_end_mark(tokenizer: Any) -> None:
    example = one(chat("hi", "ho", "ha", "he"), tokenizer)
    whole = "<s>[user]hi<end>\n[assistant]ho<end>\n[user]ha<end>\n[assistant]he<end>"
    assert text(example, tokenizer) == whole
    assert learnt(example, tokenizer) == "ho<end>he<end>"


def test_a_greeting_that_answers_nothing_is_not_learnt(tokenizer: Any) -> None:
    greeting = {"messages": [{"role": "assistant", "content": "hello"}, *chat("hi", "ho")["messages"]]}
    example = one(greeting, tokenizer)
    assert "[assistant]hello<end>" in text(example, tokenizer)
    assert learnt(example, tokenizer) == "ho<end>"


def test_a_chat_ends_with_its_last_answer(tokenizer: Any) -> None:
    assert text(one(chat("hi", "ho", "bye"), tokenizer), tokenizer).endswith("]ho<end>")


def test_a_chat_template_without_an_end_mark_gets_the_end_of_sequence_token(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learnt(one(chat("hi", "ho"), tokenizer), tokenizer) == "ho</s>"


def test_an_answer_that_later_turns_change_is_left_out_of_the_loss(tokenizer: Any) -> None:
    # As Qwen3's template does: only the last turn keeps its thoughts.
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if loop.last and m.role == 'assistant' %}hm,{% endif %}{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert learnt(one(chat("hi", "ho", "ha", "he"), tokenizer), tokenizer) == "hm,he<end>"


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
        encode([row], tokenizer, PLAIN)


def test_what_the_chat_template_refuses_is_told(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match="row 1: the chat template refuses its messages: roles must alternate"
    ):
        encode([chat("hi", "ho")], tokenizer, PLAIN)


# --- length -----------------------------------------------------------------------------------------------


def test_a_long_response_is_cut_and_its_end_is_not_learnt(tokenizer: Any) -> None:
    plan = TrainOptions(template="none", max_length=4)
    example = one({"prompt": "a", "completion": "bcdef"}, tokenizer, plan)
    assert text(example, tokenizer) == "<s>abc"
    assert learnt(example, tokenizer) == "bc"


def test_a_row_without_a_token_in_the_loss_is_none(tokenizer: Any) -> None:
    rows = [
        {"prompt": "abcde", "completion": "f"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "f"},
    ]
    first, second, third = encode(rows, tokenizer, TrainOptions(template="none", max_length=6))
    assert first is None
    assert second is None
    assert third is not None


def test_padding_is_not_in_the_loss_even_where_it_is_the_end_of_sequence_token(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id is None
    pad = padding_id(tokenizer)
    assert pad == tokenizer.eos_token_id
    short = one({"prompt": "a", "completion": "b"}, tokenizer)
    long = one({"prompt": "a", "completion": "bcd"}, tokenizer)
    batch = collate([short, long], pad)
    assert batch["input_ids"].tolist() == [short.input_ids.tolist() + [pad, pad], long.input_ids.tolist()]
    assert batch["labels"][0].tolist() == short.labels.tolist() + [IGNORED, IGNORED]
    assert batch["labels"][0, 3] == pad
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
