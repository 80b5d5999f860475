"""Everything that a chat says is used: tools, weights, system texts, other spellings; and nothing else is."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as rendering
from datasets import Dataset

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.dataset import read_dataset
from svdconvert.training.data.encode import TextRowEncoder
from svdconvert.training.data.rows import without_nulls
from tests.training.data.test_rows import write
from tests.training.encoding import PLAIN, learned, one, text

WITH_TOOLS = (
    "{% for t in tools or [] %}<{{ t | tojson }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% for key in m %}{% if key not in ('role', 'content') %}{{ key }}={{ m[key] }};{% endif %}{% endfor %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
FOUR = [*TURNS, {"role": "user", "content": "ha"}, {"role": "assistant", "content": "he"}]


def weighted(turns: list[dict[str, Any]], *weights: Any, key: str = "weight") -> dict[str, Any]:
    """A chat with the weights of its answers; None is no weight."""
    left = list(weights)
    changed = [dict(turn) for turn in turns]
    for turn in changed:
        if turn["role"] == "assistant" and (weight := left.pop(0)) is not None:
            turn[key] = weight
    return {"messages": changed}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=type)
def test_tools_reach_the_chat_template(tools: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = WITH_TOOLS
    rendered = text(one({"messages": TURNS, "tools": tools}, tokenizer), tokenizer)
    expected = tokenizer.apply_chat_template(TURNS, tools=[TOOL], tokenize=False)
    assert rendered == tokenizer.decode(tokenizer(expected, add_special_tokens=False)["input_ids"])
    assert "clock" in rendered
    assert learned(one({"messages": TURNS, "tools": tools}, tokenizer), tokenizer) == "ho<end>"


def test_tools_also_reach_the_template_of_a_prompt_and_a_response(tokenizer: Any) -> None:
    tokenizer.chat_template = WITH_TOOLS
    row = {"prompt": "hi", "completion": "ho", "tools": [TOOL]}
    assert "clock" in text(one(row, tokenizer, TrainOptions(template="chat")), tokenizer)


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"], ids=repr)
def test_a_row_without_tools_is_one_without_the_field(tools: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = WITH_TOOLS
    without = one({"messages": TURNS}, tokenizer)
    assert (
        one({"messages": TURNS, "tools": tools}, tokenizer).input_ids.tolist() == without.input_ids.tolist()
    )


def test_tools_that_the_template_does_not_use_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1: the tokenizer's chat template does not use its tools"):
        one({"messages": TURNS, "tools": [TOOL]}, tokenizer)


@pytest.mark.parametrize("tools", ["clock", "{}}", '{"name": "clock"}', [["clock"]], [3]], ids=repr)
def test_tools_of_another_form_are_refused(tools: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = WITH_TOOLS
    with pytest.raises(DataError, match="row 1: its tools are not"):
        one({"messages": TURNS, "tools": tools}, tokenizer)


def test_parquet_and_json_rows_give_the_same_tokens(tmp_path: Path, tokenizer: Any) -> None:
    """Arrow gives every object all keys of its column, filled up with nulls, also inside tools and calls."""
    tokenizer.chat_template = WITH_TOOLS
    call = {"name": "clock", "arguments": {"zone": "x"}}
    other = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "x": {"y": 1}}}}
    first = {"role": "assistant", "content": "ho", "calls": [call]}
    second = {"role": "assistant", "content": "he", "calls": [{"name": "add", "arguments": {"x": 1}}]}
    rows = [
        {"messages": [TURNS[0], first, FOUR[2], second], "tools": [TOOL, other]},
        {"messages": TURNS, "tools": [TOOL]},
        {"messages": FOUR},
    ]
    expected = TextRowEncoder(tokenizer, PLAIN)(rows)
    for name in ("rows.parquet", "rows.jsonl"):
        data = write(tmp_path / name, rows)
        splits = read_dataset(TrainOptions(data=data), TextRowEncoder(tokenizer, PLAIN))
        found = [example.input_ids.tolist() for example in splits.train]
        assert found == [example.input_ids.tolist() for example in expected if example]
        assert not any("None" in tokenizer.decode(ids) for ids in found)


def test_nulls_are_removed_at_any_depth_and_nothing_else_is() -> None:
    value = {"a": None, "b": [{"c": None, "d": 0}, None], "e": {"f": {"g": None}}, "h": False, "i": ""}
    assert without_nulls(value) == {"b": [{"d": 0}, None], "e": {"f": {}}, "h": False, "i": ""}


def test_a_field_that_is_null_in_all_rows_does_not_decide_how_rows_are_read(tokenizer: Any) -> None:
    row = {"messages": None, "question": "a", "answer": "b"}
    assert text(one(row, tokenizer), tokenizer) == "<s>ab</s>"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((None, None), "ho<end>he<end>"),
        ((1, 1), "ho<end>he<end>"),
        ((0, 1), "he<end>"),
        ((False, True), "he<end>"),
        ((0.0, None), "he<end>"),
        ((1, 0), "ho<end>"),
    ],
)
def test_only_answers_with_a_weight_are_learned(
    weights: tuple[Any, ...], expected: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = WITH_TOOLS
    example = one(weighted(FOUR, *weights), tokenizer)
    assert learned(example, tokenizer) == expected
    assert "weight" not in text(example, tokenizer)


@pytest.mark.parametrize("key", ["train", "training", "loss"])
def test_other_spellings_of_a_weight_are_known(key: str, tokenizer: Any) -> None:
    assert learned(one(weighted(FOUR, False, True, key=key), tokenizer), tokenizer) == "he<end>"


def test_a_chat_of_which_no_answer_is_learned_is_left_out(tokenizer: Any) -> None:
    assert TextRowEncoder(tokenizer, PLAIN)([weighted(FOUR, 0, 0)]) == [None]


def test_an_answer_with_weight_0_is_not_learned_with_the_prompts_either(tokenizer: Any) -> None:
    options = TrainOptions(prompt_loss=True)
    example = one(weighted(FOUR, 0, 1), tokenizer, options)
    assert "ho<end>" in text(example, tokenizer)
    assert (
        learned(example, tokenizer).replace("\n", "")
        == "<s>[user]hi<end>[assistant][user]ha<end>[assistant]he<end>"
    )


@pytest.mark.parametrize("weight", [0.5, 2, "yes"])
def test_a_weight_that_is_not_0_or_1_is_refused(weight: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1: a turn has weight .*; it can only be 0 or 1"):
        one(weighted(FOUR, weight, 1), tokenizer)


def test_a_weight_for_a_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="give a message of the user a weight"):
        one({"messages": [{**TURNS[0], "weight": 1}, TURNS[1]]}, tokenizer)
    assert learned(one({"messages": [{**TURNS[0], "weight": 0}, TURNS[1]]}, tokenizer), tokenizer)


def test_sharegpt_gives_the_tokens_of_the_same_messages(tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "be"}, *FOUR]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    expected = one({"messages": turns}, tokenizer)
    for row in (
        {"conversations": sharegpt},
        {"conversations": turns},
        {"conversations": sharegpt[1:], "system": "be"},
        {"messages": FOUR, "system": "be"},
    ):
        example = one(row, tokenizer)
        assert example.input_ids.tolist() == expected.input_ids.tolist()
        assert example.labels.tolist() == expected.labels.tolist()
    sharegpt[2]["weight"] = 0  # type: ignore[assignment]
    assert learned(one({"conversations": sharegpt}, tokenizer), tokenizer) == "he<end>"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "a turn from 'narrator'; the speakers are"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "a turn from 'gpt' without a text"),
        ({"conversations": ["x"]}, "role and content, or from and value"),
        ({"messages": TURNS, "system": 3}, "its system is not text but int"),
        (
            {"messages": [{"role": "system", "content": "a"}, *TURNS], "system": "b"},
            "in the field system and in its first turn",
        ),
    ],
)
def test_what_is_no_chat_is_refused(row: dict[str, Any], complaint: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{complaint}"):
        one(row, tokenizer)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "rejected"),
        ({"chosen": FOUR, "rejected": FOUR}, "rejected"),
        ({"question": "a", "answer": "b", "rejected": "c"}, "rejected"),
        ({"messages": TURNS, "rejected_response": "c"}, "rejected_response"),
        ({"prompt": "a", "completion": "b", "label": False}, r"label \(good or bad\)"),
    ],
)
def test_preferences_are_refused_by_name(row: dict[str, Any], name: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"row 1: it is a preference, with the field {name}"):
        one(row, tokenizer)


def test_the_chosen_answers_can_be_named(tokenizer: Any) -> None:
    options = TrainOptions(prompt_field="prompt", response_field="chosen", template="none")
    assert (
        text(one({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer, options), tokenizer)
        == "<s>ab</s>"
    )


@pytest.mark.parametrize("row", [{"messages": TURNS}, {"text": "a"}], ids=["messages", "text"])
@pytest.mark.parametrize("values", [{"template": "Q {prompt}"}, {"ending": "x"}], ids=str)
def test_options_of_prompts_are_refused_for_rows_without_one(
    values: dict[str, Any], row: dict[str, Any], tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=f"`{next(iter(values))}`.*leave it out"):
        one(row, tokenizer, TrainOptions(**values))


def test_fields_that_are_not_used_are_named_once(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": TURNS, "id": 1, "source": None, "tools": None, "mood": ""}] * 3
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    options = TrainOptions(data=str(tmp_path / "rows.parquet"))
    (warning,) = read_dataset(options, TextRowEncoder(tokenizer, options)).warnings
    assert warning == f"{options.data}: of its fields only messages are used, not id"


BARE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OF_PARTS = BARE.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
)


def parts(*texts: str, **other: Any) -> dict[str, Any]:
    """TURNS with a first message of these texts, and of one other part."""
    held = [{"type": "text", "text": one} for one in texts] + ([other] if other else [])
    return {"messages": [{"role": "user", "content": held}, TURNS[1]]}


@pytest.mark.parametrize("template", [BARE, OF_PARTS], ids=["texts", "parts"])
def test_a_message_of_one_part_is_its_text(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    assert text(one(parts("hi"), tokenizer), tokenizer) == text(
        one({"messages": TURNS}, tokenizer), tokenizer
    )


def test_several_parts_are_for_templates_that_take_them(tokenizer: Any) -> None:
    tokenizer.chat_template = OF_PARTS
    joined = {"messages": [{"role": "user", "content": "hiha"}, TURNS[1]]}
    assert text(one(parts("hi", "ha"), tokenizer), tokenizer) == text(one(joined, tokenizer), tokenizer)
    tokenizer.chat_template = BARE
    with pytest.raises(DataError, match="2 parts, and the chat template takes one text"):
        one(parts("hi", "ha"), tokenizer)


@pytest.mark.parametrize("kind", ["image", "audio", "video", "image_url"])
@pytest.mark.parametrize("template", [BARE, OF_PARTS], ids=["texts", "parts"])
def test_a_part_that_a_model_of_texts_does_not_see_is_refused(
    kind: str, template: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"a part of the type '{kind}'"):
        one(parts("hi", type=kind), tokenizer)


@pytest.mark.parametrize(
    "turn", [{"content": None}, {}, {"content": 3}, {"content": {"text": "ho"}}], ids=str
)
def test_a_message_without_a_text_is_refused(turn: dict[str, Any], tokenizer: Any) -> None:
    tokenizer.chat_template = BARE
    with pytest.raises(DataError, match="have a message of the assistant w"):
        one({"messages": [TURNS[0], {"role": "assistant", **turn}]}, tokenizer)


def test_calls_of_tools_that_the_template_does_not_use_are_refused(tokenizer: Any) -> None:
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    row = {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": calls}]}
    tokenizer.chat_template = BARE
    with pytest.raises(DataError, match="does not use the tool_calls"):
        one(row, tokenizer)
    tokenizer.chat_template = WITH_TOOLS
    assert "clock" in text(one(row, tokenizer), tokenizer)


def test_keys_of_messages_that_the_template_does_not_use_are_named_once(
    tmp_path: Path, tokenizer: Any
) -> None:
    turns = [{**TURNS[0], "name": "Ann"}, {**TURNS[1], "reasoning_content": "hm", "weight": 1}]
    data = write(tmp_path / "rows.jsonl", [{"messages": turns}] * 2)
    options = TrainOptions(data=str(data))
    tokenizer.chat_template = BARE
    (warning,) = read_dataset(options, TextRowEncoder(tokenizer, options)).warnings
    assert warning == (
        f"{data}: the chat template does not use name, reasoning_content in every message that has it"
    )
    tokenizer.chat_template = WITH_TOOLS
    assert read_dataset(options, TextRowEncoder(tokenizer, options)).warnings == []


DATED = "{{ strftime_now('%d %b %Y, %-d.%-m.') }}" + WITH_TOOLS


def set_date(monkeypatch: pytest.MonkeyPatch, date: datetime) -> None:
    """Let chat templates of transformers print `date`."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # noqa: ARG003
            return date

    monkeypatch.setattr(rendering, "datetime", Clock)


def test_a_template_that_prints_the_date_prints_the_same_on_every_day(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = DATED
    encoder = TextRowEncoder(tokenizer, PLAIN)
    (today,) = encoder([{"messages": TURNS}])
    set_date(monkeypatch, datetime(2031, 2, 3))
    assert "03 Feb 2031" in tokenizer.apply_chat_template(TURNS, tokenize=False)
    later = one({"messages": TURNS}, tokenizer)
    assert today is not None
    assert later.input_ids.tolist() == today.input_ids.tolist()
    assert text(later, tokenizer).startswith("26 Jul 2024, 26.7.[user]hi")
    (remark,) = encoder.remarks
    assert "prints the date; in all rows it is 26 July 2024" in remark


CONDITION = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %B %H') %}{% else %}{% set day = 0 %}"
    "{% endif %}{{ day }}"
)


@pytest.mark.parametrize("before", ["", "\n", "\n\n ", " ", "{# a #}\n"], ids=repr)
def test_everything_else_of_a_dated_template_stays(
    before: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = before + CONDITION + WITH_TOOLS
    dated = text(one({"messages": TURNS}, tokenizer), tokenizer)
    set_date(monkeypatch, datetime(2024, 7, 26))
    assert dated == tokenizer.apply_chat_template(TURNS, tokenize=False)
