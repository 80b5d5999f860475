"""From a row of data to the text that is trained on, and to where in it the loss lies.

The prompt is what the papers put it into, the Alpaca template, so that their rates and results carry
over (PiSSA train.py, MiLoRA train.py, SORSA dataset.py all use it, and put the response right behind it).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]

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

# In order of preference: LLM-Adapters' commonsense rows have instruction, input, output and answer,
# Alpaca's have text beside their instruction. One field is a text without a prompt, or a chat.
FIELD_SETS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("question", "answer"),
    ("instruction", "output"),
    ("query", "response"),
    ("prompt", "completion"),
    ("text",),
)


@dataclass(frozen=True, slots=True)
class Passage:
    """One row as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """(from, to) in characters: the tokens that begin there are in the loss."""
    chat: bool = False
    """True where a chat template wrote it, which brings its own special tokens."""


def format_prompt(
    prompt: str, template: str | None = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> str:
    """The text that a model is given for `prompt`, as it was in training.

    `template` is as in TrainPlan; None is the Alpaca template. "chat" needs the tokenizer. Raises DataError
    where the tokenizer has no chat template.
    """
    if template == "chat":
        return _rendered([{"role": "user", "content": prompt}], tokenizer, ask=True)
    if template == "none":
        return prompt
    return (template or ALPACA).replace("{prompt}", prompt)


def choose_fields(row: Row, plan: TrainOptions) -> tuple[str, ...]:
    """The fields to train on: (prompt, response), ("messages",) or ("text",).

    Raises DataError where the row has neither the plan's fields nor a known set.
    """
    named = None
    if plan.prompt_field is not None and plan.response_field is not None:
        named = (plan.prompt_field, plan.response_field)
    return known_fields(row, named, FIELD_SETS, "prompt_field and response_field")


def known_fields(
    row: Row, named: tuple[str, ...] | None, known: Sequence[tuple[str, ...]], options: str
) -> tuple[str, ...]:
    """The fields that were named, or the first known set that the row has.

    `options` are the settings that name them. Raises DataError where the row has not got them.
    """
    if named is not None:
        for field in named:
            if field not in row:
                raise DataError(f"there is no field {field}; {did_you_mean(field, row)}")
        return named
    for fields in known:
        if all(field in row for field in fields):
            return fields
    sets = ", ".join("/".join(fields) for fields in known)
    raise DataError(
        f"none of the known field sets ({sets}) is among the fields {', '.join(row)}: "
        f"name yours with {options}"
    )


def passage(
    row: Row, fields: tuple[str, ...], plan: TrainOptions, tokenizer: "PreTrainedTokenizerBase"
) -> Passage:
    """The text of a row. Raises DataError where a field is absent or not text, or a chat does not render."""
    found = _passage(row, fields, plan, tokenizer)
    return replace(found, spans=((0, len(found.text)),)) if plan.prompt_loss else found


def _passage(
    row: Row, fields: tuple[str, ...], plan: TrainOptions, tokenizer: "PreTrainedTokenizerBase"
) -> Passage:
    if fields == ("messages",):
        return _chat(_messages(row), tokenizer)
    if len(fields) == 1:
        text = _text(row, fields[0])
        return Passage(text, ((0, len(text)),))
    prompt, response = _text(row, fields[0]), _text(row, fields[1])
    template = plan.template
    if template is None and fields == ("prompt", "completion"):
        template = "none"
    if fields == ("instruction", "output") and row.get("input"):
        # Without a template of the user's this is Alpaca's own form for a row with an input.
        headline = "\n\n### Input:\n" if template is None else "\n\n"
        prompt = f"{prompt}{headline}{_text(row, 'input')}"
        template = template or ALPACA_WITH_INPUT
    if template == "chat":
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return _chat(turns, tokenizer)
    before, response = format_prompt(prompt, template), response + plan.ending
    return Passage(before + response, ((len(before), len(before) + len(response)),))


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if isinstance(value, str):
        return value
    what = f"it has no {field}" if value is None else f"its {field} is not text but {type(value).__name__}"
    raise DataError(f"{what}; its fields are {', '.join(k for k, v in row.items() if v is not None)}")


def _messages(row: Row) -> list[dict[str, Any]]:
    turns = row.get("messages")
    if not isinstance(turns, Sequence) or not all(
        isinstance(turn, Mapping) and turn.get("role") for turn in turns
    ):
        raise DataError("its messages are not a list of objects with role and content")
    # Arrow gives every message the keys of all messages; templates ask whether a key is there.
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def _chat(turns: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> Passage:
    """A chat up to its last assistant turn, with every assistant turn in the loss.

    What follows the mark that ends the last turn is cut off, so that nothing is learnt after it.
    """
    ends = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not ends or ends[-1] == 0:
        raise DataError("its messages hold no answer of the assistant to anything")
    text = _rendered(turns[: ends[-1] + 1], tokenizer).rstrip()
    spans = tuple(_answers(text, turns, ends, tokenizer))
    if not spans or spans[-1][1] != len(text):
        raise DataError("its last answer cannot be told from the prompt in what the chat template writes")
    return Passage(text, spans, chat=True)


def _answers(
    text: str, turns: list[dict[str, Any]], ends: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[int, int]]:
    """Where the assistant's turns lie in `text`.

    A turn that the template writes differently when others follow it (Qwen3 drops its thoughts) was never
    the model's output in this form, and is left out of the loss; so is a turn that answers nothing.
    """
    for index in ends:
        if index == 0:
            continue
        before = _rendered(turns[:index], tokenizer, ask=True)
        through = _rendered(turns[: index + 1], tokenizer).rstrip()
        if text.startswith(through) and through.startswith(before):
            yield len(before), len(through)


def _rendered(
    turns: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase | None", ask: bool = False
) -> str:
    """The chat as text; with `ask`, up to where the assistant's answer begins."""
    from jinja2 import TemplateError

    if tokenizer is None or not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template: give a template with {prompt} in it")
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(f"the chat template refuses its messages: {error}") from error
    assert isinstance(text, str)
    return text
