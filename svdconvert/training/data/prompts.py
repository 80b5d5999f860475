"""From a row of data to the text that is trained on, with the character spans that are in the loss.

The default prompt is the Alpaca template, as in the papers' own scripts, so that their learning rates and
results carry over (PiSSA train.py, MiLoRA train.py and SORSA dataset.py all use it and put the response
directly after it).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.chats import (
    CHAT_FIELDS,
    EXTRA_FIELDS,
    Chat,
    Span,
    chat_of_prompt,
    read_text_chat,
    render_chat,
    render_turns,
)
from svdconvert.training.data.rows import FieldSet, Row, find_fields, has_values

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
    ("conversations",),
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
    spans: tuple[Span, ...]
    """(start, end) in characters: the tokens that begin in a span are in the loss."""
    left_out: tuple[Span, ...] = ()
    """The answers of a chat with weight 0, which are never in the loss."""
    is_chat: bool = False
    """True if a chat template rendered the text, special tokens included."""
    unused: tuple[str, ...] = ()
    """The keys of a chat's turns that the template does not use."""


def format_prompt(
    prompt: str, template: str | None = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> str:
    """The text to give the model for `prompt` at inference, identical to the one used in training.

    `template` is as in TrainOptions; None is the Alpaca template. "chat" needs the tokenizer. Raises
    DataError if the tokenizer has no chat template.
    """
    if template == "chat":
        turns = [{"role": "user", "content": prompt}]
        return render_turns(turns, tokenizer, add_generation_prompt=True)
    if template == "none":
        return prompt
    return (template or ALPACA).replace("{prompt}", prompt)


def prompt_format(fields: FieldSet, options: TrainOptions) -> str:
    """How a model that was trained on rows with these fields is asked: a template, "chat" or "none"."""
    if fields[0] in CHAT_FIELDS:
        return "chat"
    if options.template is not None:
        return options.template
    return "none" if len(fields) == 1 or fields == ("prompt", "completion") else ALPACA


def choose_fields(row: Row, options: TrainOptions) -> FieldSet:
    """The fields to train on: (prompt, response), ("messages",), ("conversations",) or ("text",).

    Raises DataError if the row has neither the fields that the options name nor a known set of fields, if it
    is a preference, or if an option would change nothing.
    """
    named = None
    if options.prompt_field is not None and options.response_field is not None:
        named = (options.prompt_field, options.response_field)
    else:
        _refuse_preferences(row)
    fields = find_fields(row, named, FIELD_SETS, "`prompt_field` and `response_field`")
    if fields == ("prompt", "completion") and isinstance(row.get("label"), bool):
        raise DataError(_PREFERENCES.format("label (good or bad)"))
    if len(fields) == 1:
        _refuse_options_of_prompts(fields[0], options)
    return fields


_PREFERENCES = (
    "it is a preference, with the field {}, and train learns single answers; keep the good answers only, as "
    "prompt and completion or as messages"
)


def _refuse_preferences(row: Row) -> None:
    for name in has_values(row):
        if name.startswith("rejected") or name == "non_preferred_output":
            raise DataError(_PREFERENCES.format(name))


def _refuse_options_of_prompts(field: str, options: TrainOptions) -> None:
    """Raise DataError for an option that shapes a prompt and its response, which the rows do not have."""
    own = (None, "none", "chat") if field in CHAT_FIELDS else (None, "none")
    if options.template not in own:
        raise DataError(
            f"a row with {field} needs no prompt template, so `template` would change nothing; leave it out"
        )
    if options.ending:
        raise DataError(f"a row with {field} has no response to append `ending` to; leave it out")


def used_fields(fields: FieldSet, options: TrainOptions) -> set[str]:
    """The fields of rows that influence what is trained."""
    used = set(fields)
    if fields == ("instruction", "output"):
        used.add("input")
    if fields[0] in CHAT_FIELDS or (len(fields) == 2 and options.template == "chat"):
        used.update(EXTRA_FIELDS)
    return used


def render_row(
    row: Row, fields: FieldSet, options: TrainOptions, tokenizer: "PreTrainedTokenizerBase"
) -> TrainingText:
    """The text of a row. Raises DataError if a field is missing or not text, or a chat cannot be rendered."""
    return with_prompt_loss(_render_fields(row, fields, options, tokenizer), options)


def with_prompt_loss(text: TrainingText, options: TrainOptions) -> TrainingText:
    """The same text, with its prompts in the loss too if the options ask for that."""
    if options.prompt_loss:
        return replace(text, spans=tuple(_gaps(text.left_out, len(text.text))))
    return text


def _gaps(spans: tuple[Span, ...], end: int) -> Iterator[Span]:
    """What of 0..`end` is outside `spans`, which are sorted."""
    begin = 0
    for start, stop in spans:
        yield begin, start
        begin = stop
    yield begin, end


def _render_fields(
    row: Row, fields: FieldSet, options: TrainOptions, tokenizer: "PreTrainedTokenizerBase"
) -> TrainingText:
    if fields[0] in CHAT_FIELDS:
        return chat_text(read_text_chat(row, fields[0], tokenizer), tokenizer)
    if len(fields) == 1:
        text = _text(row, fields[0])
        return TrainingText(text, ((0, len(text)),))
    template = options.template
    if template is None and fields == ("prompt", "completion"):
        template = "none"
    if template == "chat":
        return chat_text(chat_of_prompt(*prompt_and_response(row, fields, options), row), tokenizer)
    prompt = _text(row, fields[0])
    response = _text(row, fields[1])
    if _has_input(row, fields):
        # Alpaca's own form of a row with an input, unless the user chose a template.
        heading = "\n\n### Input:\n" if template is None else "\n\n"
        prompt = f"{prompt}{heading}{_text(row, 'input')}"
        template = template or ALPACA_WITH_INPUT
    before = format_prompt(prompt, template)
    text = before + response + options.ending
    return TrainingText(text, ((len(before), len(text)),))


def prompt_and_response(row: Row, fields: FieldSet, options: TrainOptions) -> tuple[str, str]:
    """(prompt, response) of a row for a chat template. Raises DataError if one is missing or not text."""
    prompt = _text(row, fields[0])
    response = _text(row, fields[1])
    if _has_input(row, fields):
        prompt = f"{prompt}\n\n{_text(row, 'input')}"
    return prompt, response + options.ending


def _has_input(row: Row, fields: FieldSet) -> bool:
    return fields == ("instruction", "output") and bool(row.get("input"))


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if isinstance(value, str):
        return value
    what = f"it has no {field}" if value is None else f"its {field} is not text but {type(value).__name__}"
    present = ", ".join(name for name, content in row.items() if content is not None)
    raise DataError(f"{what}; its fields are {present}")


def chat_text(chat: Chat, tokenizer: "PreTrainedTokenizerBase") -> TrainingText:
    """A chat as text, with its answers in the loss."""
    rendered = render_chat(chat, tokenizer)
    return TrainingText(
        rendered.text, rendered.learned, rendered.left_out, is_chat=True, unused=rendered.unused
    )
