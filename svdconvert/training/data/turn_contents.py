"""What the turns of a chat hold: texts, or lists of parts, and keys that a chat template may not use."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from svdconvert.errors import DataError, brief

Turn = dict[str, Any]

_WITH_TEXT = ("system", "user", "assistant")
_PROBE = "svdconvert-text"
_ALWAYS = ("role", "content")


def check_contents(turns: Sequence[Turn], field: str) -> None:
    """Raise DataError for a message without a content, or with one that is neither text nor parts."""
    for turn in turns:
        if turn["role"] not in _WITH_TEXT:
            continue  # what a tool answers has many forms
        content = turn.get("content")
        if content is None and not turn.keys() - {"role"}:
            raise DataError(f"its {field} have a message of the {turn['role']} without a content")
        if content is not None and not isinstance(content, str | list):
            raise DataError(
                f"its {field} have a message of the {turn['role']} whose content is no text and no list of "
                f"parts: {brief(content)}"
            )


def with_texts(turns: Sequence[Turn], field: str, takes_parts: Callable[[], bool]) -> list[Turn]:
    """The turns with a text in place of its only part, as every chat template takes it.

    Raises DataError for parts other than text, which a model of texts does not see, and for several parts
    if the chat template does not take lists.
    """
    return [
        {**turn, "content": _text_of(turn["content"], field, takes_parts)} if _has_parts(turn) else turn
        for turn in turns
    ]


def _has_parts(turn: Turn) -> bool:
    return isinstance(turn.get("content"), list) and turn["role"] in _WITH_TEXT


def _text_of(parts: list[Any], field: str, takes_parts: Callable[[], bool]) -> Any:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise DataError(
                f"its {field} hold a part of the type {brief(kind)}, of which nothing would be learned here: "
                "only texts are; remove it"
            )
        texts.append(part["text"])
    if len(texts) == 1:
        return texts[0]
    if not takes_parts():
        raise DataError(
            f"its {field} hold a message of {len(texts)} parts, and the chat template takes one text; join "
            "them"
        )
    return parts


def probe_of_parts() -> tuple[list[Turn], Callable[[str], bool]]:
    """A message of two parts, and whether its text shows that a template takes lists of parts."""
    parts = [{"type": "text", "text": f"{_PROBE}-{number}"} for number in (1, 2)]

    def is_taken(text: str) -> bool:
        return (
            f"{_PROBE}-1" in text and f"{_PROBE}-2" in text and "'type'" not in text and '"type"' not in text
        )

    return [{"role": "user", "content": parts}], is_taken


def unused_keys(turns: Sequence[Turn], text: str, render: Callable[[list[Turn]], str]) -> list[str]:
    """The keys of turns without which a chat template renders the same `text`."""
    keys = dict.fromkeys(key for turn in turns for key in turn if key not in _ALWAYS)
    return [key for key in keys if _without(key, turns, render) == text]


def _without(key: str, turns: Sequence[Turn], render: Callable[[list[Turn]], str]) -> str | None:
    try:
        return render([{name: value for name, value in turn.items() if name != key} for turn in turns])
    except DataError:  # the template asks for the key
        return None
