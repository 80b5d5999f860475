"""Chats: from a row to turns and tools, and from those to text with the spans of the answers.

A chat is a list of turns, either as OpenAI and transformers write it (`messages` with role and content) or as
ShareGPT does (`conversations` with from and value).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.json_text import parse_json
from svdconvert.errors import DataError, brief
from svdconvert.training.data.rows import Row, without_nulls
from svdconvert.training.data.turn_contents import (
    Turn,
    check_contents,
    probe_of_parts,
    unused_keys,
    with_texts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""(start, end) in characters."""

CHAT_FIELDS = ("messages", "conversations")
EXTRA_FIELDS = ("tools", "system")
"""Fields of a row that are used in addition to its chat."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's name of a speaker -> role."""

WEIGHT_KEYS = ("weight", "train", "training", "loss")
"""Keys of a turn that say whether it is learned: OpenAI's, those of Axolotl, and that of ms-swift."""

DATE = datetime(2024, 7, 26)
"""The date that chat templates print. It is constant, so that a run gives the same bytes on every day; this
is the one that Llama 3's own template prints if it is given none."""
_PROBE = "svdconvert-text"
_DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYZ"


@dataclass(frozen=True, slots=True)
class Chat:
    """The turns of a row, up to its last answer that is learned."""

    turns: list[Turn]
    """role, content and whatever else the template may read; without weights and without null keys."""
    answers: Mapping[int, bool]
    """Index of every turn of the assistant -> True if it is learned."""
    tools: list[dict[str, Any]] | None = None
    """The JSON schemas of the tools."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as text."""

    text: str
    learned: tuple[Span, ...]
    left_out: tuple[Span, ...]
    """The answers with weight 0."""
    unused: tuple[str, ...] = ()
    """The keys of turns that the chat template does not use."""


def chat_of_prompt(prompt: str, response: str, row: Row) -> Chat:
    """A chat of one prompt and one response, with the system text and the tools of the row."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    turns = _with_system(turns, row)
    return Chat(turns, {len(turns) - 1: True}, _tools(row))


def read_chat(row: Row, field: str, prepare: Callable[[list[Turn]], list[Turn]] | None = None) -> Chat:
    """The chat in a field of a row, whose turns `prepare` may change.

    Raises DataError if it is none, or has no answer to another message.
    """
    turns = _with_system(_turns(row, field), row)
    check_contents(turns, field)
    if prepare is not None:
        turns = prepare(turns)
    answers = {index: _weight(turn) for index, turn in enumerate(turns) if turn["role"] == "assistant"}
    for turn in turns:
        if turn["role"] != "assistant" and _weight(turn, default=False):
            raise DataError(
                f"its {field} give a message of the {turn['role']} a weight, but only answers of the "
                "assistant are learned; remove it"
            )
    if not answers or max(answers) == 0:
        raise DataError(f"its {field} have no answer of the assistant to another message")
    last = max((index for index, is_learned in answers.items() if is_learned), default=-1)
    plain = [{key: value for key, value in turn.items() if key not in WEIGHT_KEYS} for turn in turns]
    kept = {index: is_learned for index, is_learned in answers.items() if index <= last}
    return Chat(plain[: last + 1], kept, _tools(row))


def read_text_chat(row: Row, field: str, tokenizer: "PreTrainedTokenizerBase") -> Chat:
    """The chat in a field of a row for a model of texts. Raises DataError as `read_chat`, and for images."""
    return read_chat(row, field, lambda turns: with_texts(turns, field, lambda: _takes_parts(tokenizer)))


def _turns(row: Row, field: str) -> list[Turn]:
    turns = row.get(field)
    if isinstance(turns, Sequence) and not isinstance(turns, str):
        # Arrow gives every message the keys of all messages, but templates test whether a key is present.
        present = without_nulls(list(turns))
        if all(isinstance(turn, Mapping) for turn in present):
            if any("from" in turn for turn in present):
                return [_from_sharegpt(turn, field) for turn in present]
            if all(turn.get("role") for turn in present):
                return [dict(turn) for turn in present]
    raise DataError(f"its {field} are not a list of objects with role and content, or from and value")


def _from_sharegpt(turn: Turn, field: str) -> Turn:
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(f"its {field} have a turn from {brief(speaker)}; the speakers are {', '.join(ROLES)}")
    if not isinstance(turn.get("value"), str):
        raise DataError(f"its {field} have a turn from {speaker!r} without a text in value")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": ROLES[speaker], "content": turn["value"], **others}


def _with_system(turns: list[Turn], row: Row) -> list[Turn]:
    """The turns after the text in the row's field system, if it has one."""
    system = row.get("system")
    if not system:
        return turns
    if not isinstance(system, str):
        raise DataError(f"its system is not text but {type(system).__name__}")
    if turns and turns[0]["role"] == "system":
        raise DataError("it has a system text in the field system and in its first turn; keep one of them")
    return [{"role": "system", "content": system}, *turns]


def _weight(turn: Turn, *, default: bool = True) -> bool:
    for key in WEIGHT_KEYS:
        if key in turn:
            if turn[key] not in (0, 1):
                raise DataError(f"a turn has {key} {brief(turn[key])}; it can only be 0 or 1")
            return bool(turn[key])
    return default


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """The tools of a row, given as a list or as its JSON text; None if there are none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools.encode())
        except ValueError as error:
            raise DataError(f"its tools are not JSON: {error}") from error
    elif isinstance(tools, Sequence) and not isinstance(tools, str):
        tools = [_parsed(tool) for tool in tools]
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("its tools are not a list of objects; give the JSON schemas of the tools")
    return tools


def _parsed(tool: Any) -> Any:
    """One tool of a list: an object without the null keys that Arrow adds, or the JSON text of one."""
    if not isinstance(tool, str):
        return without_nulls(tool)
    try:
        return parse_json(tool.encode())
    except ValueError as error:
        raise DataError(f"its tools are not JSON: {error}") from error


def render_chat(chat: Chat, tokenizer: "PreTrainedTokenizerBase") -> RenderedChat:
    """The chat as text, with the spans of its answers.

    Whitespace after the end marker of the last turn is removed, so that nothing after it is trained on. An
    answer is learned unless its weight is 0, it is the first turn, which answers nothing, or the template
    renders it differently if other turns follow (Qwen3 removes the thinking part): the model never generates
    it in that form. Raises DataError if the template cannot render the chat, does not use its tools, or does
    not separate the last answer from the prompt.
    """
    if not any(chat.answers.values()):
        return RenderedChat("", (), ())
    text = render_turns(chat.turns, tokenizer, tools=chat.tools).rstrip()
    if chat.tools and text == render_turns(chat.turns, tokenizer).rstrip():
        raise DataError(
            "the tokenizer's chat template does not use its tools, so they would change nothing; remove the "
            "field tools, or use a tokenizer with a chat template for tools"
        )
    unused = unused_keys(chat.turns, text, lambda turns: _rendered(turns, chat, tokenizer))
    if "tool_calls" in unused:
        raise DataError(
            "the tokenizer's chat template does not use the tool_calls of its messages, so they would not be "
            "learned; use a tokenizer with a chat template for tools"
        )
    spans = dict(_answer_spans(text, chat, tokenizer))
    learned = tuple(span for index, span in spans.items() if chat.answers[index])
    if not learned or learned[-1][1] != len(text):
        raise DataError("its last answer cannot be separated from the prompt in the rendered chat template")
    left_out = tuple(span for index, span in spans.items() if not chat.answers[index])
    return RenderedChat(text, learned, left_out, tuple(unused))


def _rendered(turns: list[Turn], chat: Chat, tokenizer: "PreTrainedTokenizerBase") -> str:
    return render_turns(turns, tokenizer, tools=chat.tools).rstrip()


def _answer_spans(text: str, chat: Chat, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[int, Span]]:
    """(index of the turn, span in `text`) of the answers that can be located in it."""
    for index in chat.answers:
        if index == 0:
            continue
        before = render_turns(chat.turns[:index], tokenizer, tools=chat.tools, add_generation_prompt=True)
        through = render_turns(chat.turns[: index + 1], tokenizer, tools=chat.tools).rstrip()
        if text.startswith(through) and through.startswith(before):
            yield index, (len(before), len(through))


def render_turns(
    turns: list[Turn],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Turns as text; with `add_generation_prompt`, up to the start of the assistant's answer."""
    from jinja2 import TemplateError

    if tokenizer is None or not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template: give a template with {prompt} in it")
    template = tokenizer.get_chat_template(tools=tools)
    try:
        text = tokenizer.apply_chat_template(
            _as_parts(turns) if _takes_parts_only(tokenizer, template) else turns,
            tools=tools,  # type: ignore[arg-type]
            chat_template=_with_constant_date(template),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"the chat template refuses its messages: {error}") from error
    assert isinstance(text, str)
    return text


def _as_parts(turns: list[Turn]) -> list[Turn]:
    """The turns with every text as a list of one part."""
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn.get("content"), str)
        else turn
        for turn in turns
    ]


@lru_cache(maxsize=4)
def _takes_parts_only(tokenizer: "PreTrainedTokenizerBase", template: str) -> bool:
    """True for a template that drops a text that is not in a list of parts, as those of LLaVA do."""
    if "type" not in template:
        return False
    from jinja2 import TemplateError

    def keeps_text(turns: list[Turn]) -> bool:
        try:
            text = tokenizer.apply_chat_template(
                turns, chat_template=_with_constant_date(template), tokenize=False
            )
        except (TemplateError, TypeError, KeyError, ValueError):
            return False
        return _PROBE in str(text)

    turns: list[Turn] = [{"role": "user", "content": _PROBE}]
    return not keeps_text(turns) and keeps_text(_as_parts(turns))


def _takes_parts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if the chat template renders a list of texts as texts, and not as a list."""
    turns, is_taken = probe_of_parts()
    try:
        return is_taken(render_turns(turns, tokenizer))
    except DataError:
        return False


def prints_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if a chat template of the tokenizer asks for the date."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


def _with_constant_date(template: str) -> str:
    """The template with a macro that takes the place of transformers' function `strftime_now`.

    A variable of that name cannot be given to the template: transformers hands it plain data only.
    """
    if "strftime_now" not in template:
        return template
    formatted = "format"
    for directive in _DIRECTIVES:
        value = DATE.strftime(f"%{directive}")
        for spelling, text in ((f"%-{directive}", value.lstrip("0") or "0"), (f"%{directive}", value)):
            formatted += f" | replace({json.dumps(spelling)}, {json.dumps(text)})"
    # The template must begin at the start of a line, and transformers removes a line break after a block.
    return f"{{%- macro strftime_now(format) -%}}{{{{ {formatted} }}}}{{%- endmacro %}}\n{template}"
