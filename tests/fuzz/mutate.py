"""Changes of inputs: of bytes, of JSON values, and of text. All follow from the given random numbers."""

import json
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], bytes]

# Text that JSON's writer would not produce: put in place of a string that stands for it.
_RAW = {
    "deep list": "[" * 3000 + "]" * 3000,
    "deep object": '{"a":' * 1500 + "1" + "}" * 1500,
    "nearly too deep": "[" * 600 + "]" * 600,
    "digits": "9" * 5000,
    "4300 digits": "9" * 4300,
    "out of range": "1e999",
    "minus zero": "-0",
    "infinity": "-Infinity",
    "twice": '{"a":1,"a":2}',
    "control": '"\x01\t"',
    "octal": "017",
    "comment": "/* */ 1",
    "missing": "",
}
_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/../../b",
    ".git/config",
    "~",
    "C:\\x",
    "-o",
    "a\\b",
    "a b",
    "*",
    "%s",
    "x" * 300,
    "a/" * 3000,
    "é",
    "\x1b[31m",
    "a\0b",
    "a\nb",
    "\ud800",
    "\u202ea",
    "\ufeff",
    "[/x]",
    "{0}",
    "(a+)+$",
    "(((",
    "a{99999}",
    "model.safetensors",
    "config.json",
    "2",
    "²",
    "1e5",
    "None",
    "hf_" + "a" * 20,
    "blocks.999999999999.att.key.weight",
    "model.layers.1.mlp.down_proj.weight",
    "__class__",
    "__metadata__",
]
_NUMBERS = [
    0,
    1,
    2,
    -1,
    8,
    127,
    2**20,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**400,
    1.5,
    -0.0,
    1e-320,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
]
_OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"": None}, [0, 8], {"a": 1}, ["a", 1]]
_BYTES = [
    b"\0",
    b"\xff",
    b"\xff" * 8,
    b"\x7f",
    b"{",
    b"}",
    b"[",
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"\xed\xa0\x80",
    b"\x1b",
    b"9" * 40,
    (2**31).to_bytes(4, "little"),
    (2**63).to_bytes(8, "little"),
    b" " * 64,
]


def value(chance: Random) -> Any:
    """An odd value."""
    kind = chance.randrange(4)
    if kind == 0:
        return chance.choice(_NUMBERS)
    if kind == 1:
        return chance.choice(_NAMES)
    return chance.choice(_OTHERS) if kind == 2 else f"raw:{chance.choice([*_RAW])}"


def change_json(chance: Random, raw: bytes) -> bytes:
    """A JSON text with one to three changes of its values; a few changed bytes if it is no JSON."""
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        return change_bytes(chance, raw)
    if chance.random() < 0.1:
        return change_bytes(chance, raw)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        tree = change_tree(chance, tree)
    return written(chance, tree)


def written(chance: Random, tree: Any) -> bytes:
    """A JSON text of a tree, in which the names of raw values are replaced by these."""
    try:
        text = json.dumps(tree, ensure_ascii=chance.random() < 0.8)
    except (RecursionError, ValueError):  # a list in itself, or a number of too many digits
        return b"[]"
    for name, replacement in _RAW.items():
        text = text.replace(f'"raw:{name}"', replacement)
    encoding = chance.choice(["utf-8"] * 40 + ["utf-16", "utf-32", "utf-8-sig"])
    return text.encode(encoding, "surrogatepass")


def change_tree(chance: Random, tree: Any) -> Any:
    """A tree of JSON values with one change at a random place."""
    if isinstance(tree, dict | list) and tree and chance.random() < 0.85:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = chance.choice(keys)
        if chance.random() < 0.75:
            changed = change_tree(chance, tree[key])
            return (
                {**tree, key: changed} if isinstance(tree, dict) else [*tree[:key], changed, *tree[key + 1 :]]
            )
        return _rearranged(chance, tree, key)
    return _replaced(chance, tree)


def _rearranged(chance: Random, tree: Any, key: Any) -> Any:
    """A list or an object without an item, with another one, or with two items exchanged."""
    how = chance.randrange(4)
    if isinstance(tree, list):
        other = chance.randrange(len(tree))
        choices = [
            [*tree[:key], *tree[key + 1 :]],
            [*tree, value(chance)],
            [*tree, *tree[key : key + 1]],
            [tree[other] if index == key else item for index, item in enumerate(tree)],
        ]
        return choices[how]
    rest = {name: item for name, item in tree.items() if name != key}
    name = chance.choice(_NAMES)
    exchanged = {**tree, key: tree[chance.choice([*tree])]}
    return [rest, {**tree, name: value(chance)}, {**rest, name: tree[key]}, exchanged][how]


def _replaced(chance: Random, item: Any) -> Any:
    if isinstance(item, bool) or chance.random() < 0.5:
        return value(chance)
    if isinstance(item, int) and abs(item) < 1 << 64:
        return chance.choice(
            [item + 1, item - 1, -item, item * 2, item << 32, float(item), str(item), [item]]
        )
    if isinstance(item, str):
        at = chance.randrange(len(item) + 1)
        return chance.choice(
            [item[:at], item[at:], item[:at] + chance.choice(_NAMES) + item[at:], item.upper(), [item]]
        )
    return value(chance)


def change_bytes(chance: Random, raw: bytes) -> bytes:
    """Some bytes with one to four changes."""
    data = bytearray(raw)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.randrange(len(data) + 1)
        to = min(len(data), at + chance.choice([1, 1, 2, 8, 64, 1000]))
        how = chance.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            del data[at:to]
        elif how == 2:
            data[at:at] = chance.choice(_BYTES)
        elif how == 3:
            data[at:at] = data[at:to]
        elif how == 4:
            data[at:to] = bytes(chance.randrange(256) for _ in range(to - at))
        else:
            odd = chance.choice(_BYTES)
            data[at : at + len(odd)] = odd
    return bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.1 else data)


def change_text(tokens: Sequence[str]) -> Mutator:
    """A mutator that also inserts `tokens`, removes lines and repeats them."""

    def change(chance: Random, raw: bytes) -> bytes:
        if chance.random() < 0.2:
            return change_bytes(chance, raw)
        parts = raw.splitlines(keepends=True) or [b""]
        for _ in range(chance.choice([1, 1, 2, 3])):
            at = chance.randrange(len(parts)) if parts else 0
            token = chance.choice([*tokens, *_NAMES, str(chance.choice(_NUMBERS))]).encode(
                "utf-8", "surrogatepass"
            )
            line = parts[at] if parts else b""
            middle = chance.randrange(len(line) + 1)
            choices = [
                [line[:middle] + token + line[middle:]],
                [line[:middle] + token + b"\n"],
                [],
                [line, line],
                [token + b"\n", line],
            ]
            parts[at : at + 1] = chance.choice(choices)
        return b"".join(parts)

    return change


def change_lines(chance: Random, raw: bytes) -> bytes:
    """JSON lines with one line changed, removed or repeated."""
    lines = raw.splitlines(keepends=True)
    if not lines or chance.random() < 0.1:
        return change_bytes(chance, raw)
    at = chance.randrange(len(lines))
    changed = change_json(chance, lines[at]) + b"\n"
    return b"".join(
        [*lines[:at], *chance.choice([[changed], [changed], [changed], [], lines[at:] * 2]), *lines[at + 1 :]]
    )
