"""From a row of data to the text that is trained on, with the character spans that are in the loss.

The default prompt is the Alpaca template, as in the papers' own scripts, so that their learning rates and
results carry over (PiSSA train.py, MiLoRA train.py and SORSA dataset.py all use it and put the response
directly after it).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.rows import FieldSet, Row, find_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{prompt}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{prompt}\n\n### Response:"
)

# In order of preference: the commonsense rows of LLM-Adapters have instruction, input, output and answer, and
# Alpaca's have text in addition to instruction. A single field is a text without a prompt, or a chat.
FIELD_SETS: tuple[FieldSet, ...] = (
    ("messages",),
    ("question", "answer"),
    ("instruction", "output"),
    ("query", "response"),
    ("prompt", "completion"),
    ("text",),
)


@dataclass(frozen=True, slots=True)
class TrainingText:
    """One row as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """(start, end) in characters: the tokens that begin in a span are in the loss."""
    is_chat: bool = False
    """True if a chat template rendered the text, special tokens included."""


def format_prompt(
    prompt: str, template: str | None = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> str:
    """The text to give the model for `prompt` at inference, identical to the one used in training.

    `template` is as in TrainOptions; None is the Alpaca template. "chat" needs the tokenizer. Raises
    DataError if the tokenizer has no chat template.
    """
    if template == "chat":
        turns = [{"role": "user", "content": prompt}]
        return _render_chat(turns, tokenizer, add_generation_prompt=True)
    if template == "none":
        return prompt
    return (template or ALPACA).replace("{prompt}", prompt)


def choose_fields(row: Row, options: TrainOptions) -> FieldSet:
    """The fields to train on: (prompt, response), ("messages",) or ("text",).

    Raises DataError if the row has neither the fields that the options name nor a known set of fields.
    """
    named = None
    if options.prompt_field is not None and options.response_field is not None:
        named = (options.prompt_field, options.response_field)
    return find_fields(row, named, FIELD_SETS, "prompt_field and response_field")


def render_row(
    row: Row, fields: FieldSet, options: TrainOptions, tokenizer: "PreTrainedTokenizerBase"
) -> TrainingText:
    """The text of a row. Raises DataError if a field is missing or not text, or a chat cannot be rendered."""
    rendered = _render_fields(row, fields, options, tokenizer)
    if options.prompt_loss:
        return replace(rendered, spans=((0, len(rendered.text)),))
    return rendered


def _render_fields(
    row: Row, fields: FieldSet, options: TrainOptions, tokenizer: "PreTrainedTokenizerBase"
) -> TrainingText:
    if fields == ("messages",):
        return _chat_text(_messages(row), tokenizer)
    if len(fields) == 1:
        text = _text(row, fields[0])
        return TrainingText(text, ((0, len(text)),))
    prompt, response = _text(row, fields[0]), _text(row, fields[1])
    template = options.template
    if template is None and fields == ("prompt", "completion"):
        template = "none"
    if fields == ("instruction", "output") and row.get("input"):
        # Alpaca's own form of a row with an input, unless the user chose a template.
        heading = "\n\n### Input:\n" if template is None else "\n\n"
        prompt = f"{prompt}{heading}{_text(row, 'input')}"
        template = template or ALPACA_WITH_INPUT
    if template == "chat":
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return _chat_text(turns, tokenizer)
    before = format_prompt(prompt, template)
    text = before + response + options.ending
    return TrainingText(text, ((len(before), len(text)),))


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if isinstance(value, str):
        return value
    what = f"it has no {field}" if value is None else f"its {field} is not text but {type(value).__name__}"
    present = ", ".join(name for name, content in row.items() if content is not None)
    raise DataError(f"{what}; its fields are {present}")


def _messages(row: Row) -> list[dict[str, Any]]:
    turns = row.get("messages")
    if not isinstance(turns, Sequence) or not all(
        isinstance(turn, Mapping) and turn.get("role") for turn in turns
    ):
        raise DataError("its messages are not a list of objects with role and content")
    # Arrow gives every message the keys of all messages, but templates test whether a key is present.
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def _chat_text(turns: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> TrainingText:
    """A chat up to its last assistant turn, with every assistant turn in the loss.

    Whitespace after the end marker of the last turn is removed, so that nothing after it is trained on.
    """
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise DataError("its messages have no answer of the assistant to another message")
    text = _render_chat(turns[: answers[-1] + 1], tokenizer).rstrip()
    spans = tuple(_answer_spans(text, turns, answers, tokenizer))
    if not spans or spans[-1][1] != len(text):
        raise DataError("its last answer cannot be separated from the prompt in the rendered chat template")
    return TrainingText(text, spans, is_chat=True)


def _answer_spans(
    text: str, turns: list[dict[str, Any]], answers: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[int, int]]:
    """(start, end) in `text` of the assistant turns, whose indices are `answers`.

    Two kinds of turns are left out of the loss: a first turn, which answers nothing, and one that the
    template renders differently if other turns follow (Qwen3 removes the thinking part), because the model
    never generates it in that form.
    """
    for index in answers:
        if index == 0:
            continue
        before = _render_chat(turns[:index], tokenizer, add_generation_prompt=True)
        through = _render_chat(turns[: index + 1], tokenizer).rstrip()
        if text.startswith(through) and through.startswith(before):
            yield len(before), len(through)


def _render_chat(
    turns: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase | None",
    add_generation_prompt: bool = False,
) -> str:
    """The chat as text; with `add_generation_prompt`, up to where the assistant's answer begins."""
    from jinja2 import TemplateError

    if tokenizer is None or not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template: give a template with {prompt} in it")
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(f"the chat template refuses its messages: {error}") from error
    assert isinstance(text, str)
    return text
