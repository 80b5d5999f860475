"""JSON that anybody may have written: what is returned can be walked through, compared and written again."""

import json
from pathlib import Path
from typing import Any

DEEPEST = 127
"""Levels of objects and arrays, as in the header of a safetensors file."""


def read_json(path: Path) -> Any:
    """The value in a JSON file in UTF-8. Raises OSError if the file cannot be read.

    Raises ValueError as `parse_json` does, and for half of a surrogate pair, which no file can hold.
    """
    text = path.read_bytes()
    value = parse_json(text)
    if b"\\u" in text:
        refuse_half_characters(value)
    return value


def parse_json(text: bytes) -> Any:
    """The value of a JSON text in UTF-8. NaN and Infinity are numbers, as Python's own writer has them.

    Raises ValueError for anything else, such as another encoding, and for more than 127 levels.
    """
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it has too many levels") from error
    if depth(value) > DEEPEST:
        raise ValueError("it has too many levels")
    return value


def refuse_half_characters(value: Any) -> None:
    """Raise ValueError if a text in a value holds half of a surrogate pair."""
    json.dumps(value, ensure_ascii=False).encode()


def depth(value: Any) -> int:
    """How many objects and arrays contain each other."""
    levels = 0
    level = [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        levels += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return levels
