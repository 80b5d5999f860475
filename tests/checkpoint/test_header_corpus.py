"""Several hundred damaged headers, each of which the safetensors library is given as well.

What is read here the library reads in the same way. What is refused here the library refuses too, except for
what the format forbids and the library lets through: bytes before the first brace, keys that
stand twice, rows that are lists, and element types that are objects.
"""
# ruff: noqa: UP031 (braces are the content)

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from svdconvert.checkpoint.safetensors_files import read_header
from svdconvert.errors import CheckpointError

ROW = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
EMPTY = '{"e":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}}'
EXTRA = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"z":%s}}'
KEPT: list[tuple[str | bytes, int]] = [
    ("{%s}" % ROW, 8),
    ("{%s} \n\t\r" % ROW, 8),
    ("{%s}\0" % ROW, 8),
    ("\ufeff{%s}" % ROW, 8),
    (("{%s}" % ROW).encode("utf-16"), 8),
    (("{%s}" % ROW).encode("utf-32"), 8),
    (b'{"\xe9":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    (b'{"\xed\xa0\x80":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    ('{"é":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    ('{"":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    ('{"%s":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' % ("n" * 70_000), 8),
    ('{"__metadata__":{"format":"pt"},%s}' % ROW, 8),
    ('{"__metadata__":null,%s}' % ROW, 8),
    ('{"__metadata__":{"x":1},%s}' % ROW, 8),
    ('{"__metadata__":{"x":null},%s}' % ROW, 8),
    ('{"__metadata__":[],%s}' % ROW, 8),
    ('{"__metadata__":"x",%s}' % ROW, 8),
    ('{"__metadata__":{},"__metadata__":{},%s}' % ROW, 8),
    ('{"__metadata__":{"x":"\\ud800"},%s}' % ROW, 8),
    ('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}}', 8),
    ('{"a":{"dtype":"F32","shape":[2],"data_offsets":{"0":0,"8":8}}}', 8),
    ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', 8),
    ('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', 8),
    ('{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', 8),
    ('{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', 8),
    ('{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}', 8),
    ('{"a":{"dtype":"F32","shape":{},"data_offsets":[0,4]}}', 4),
    ('{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', 4),
    ('{"a":{"dtype":"F32","shape":[%s2],"data_offsets":[0,8]}}' % ("1," * 3000), 8),
    ('{"e":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}', 2),
    ('{"e":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}', 2),
    ('{"e":{"dtype":"F6_E3M2","shape":[4],"data_offsets":[0,3]}}', 3),
    ('{"e":{"dtype":"F6_E3M2","shape":[3],"data_offsets":[0,3]}}', 3),
    *[(EMPTY % sides, 0) for sides in (
        "0", f"{2**40},{2**40},0", f"0,{2**40},{2**40}", f"{2**62},0", f"{2**64 - 1},0", f"0,{2**64 - 1}",
        f"0,{2**64}", f"{10**4000},0", f"0,{10**4000}", ",".join([str(10**4000)] * 300 + ["0"]),
    )],
    *[(EXTRA % value, 8) for value in (
        "1", "null", "-0", "NaN", "Infinity", "-", "1e999", "1e300", "1.5", "9" * 400, "9" * 5000, "9" * 30,
        '"\\ud800"', '"\\ud83d\\ude00"', '"\\udc00\\ud800"', '"\x01"', '{"q":[1,{"r":2}]}',
        "[" * 124 + "]" * 124, "[" * 125 + "]" * 125, "[" * 126 + "]" * 126, "[" * 5000 + "]" * 5000,
    )],
    ("{}", 0), ("[]", 0), ("", 0), ("null", 0), ('{"a":null}', 0), ("{", 0), ("3", 0), ("{}{}", 0),
]  # fmt: skip
FORBIDDEN = [
    (" {%s}" % ROW, 8),
    ("{%s,%s}" % (ROW, ROW), 8),
    ('{"__metadata__":{"x":"1","x":"2"},%s}' % ROW, 8),
    (EXTRA % '1,"z":2', 8),
    ('{"a":["F32",[2],[0,8]]}', 8),
    ('{"a":{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}}', 8),
]


def packed(text: str | bytes, data: int) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def of_the_library(file: Path) -> dict[str, list[int]] | None:
    """Shapes by name, or None if the library refuses the file."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def of_ours(file: Path) -> dict[str, list[int]] | None:
    try:
        return {extent.info.name: list(extent.info.shape) for extent in read_header(file)}
    except CheckpointError:
        return None


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], tuple[Any, Any]]:
    """What is read here, and what the library reads, of a file with these bytes."""

    def both(raw: bytes) -> tuple[Any, Any]:
        (tmp_path / "f").write_bytes(raw)
        return of_ours(tmp_path / "f"), of_the_library(tmp_path / "f")

    return both


@pytest.mark.parametrize("number", range(len(KEPT)))
def test_a_kept_header_is_read_as_the_library_reads_it(
    number: int, read: Callable[[bytes], tuple[Any, Any]]
) -> None:
    found, known = read(packed(*KEPT[number]))
    assert found == known


@pytest.mark.parametrize("number", range(len(FORBIDDEN)))
def test_what_the_format_forbids_is_refused(number: int, read: Callable[[bytes], tuple[Any, Any]]) -> None:
    found, _ = read(packed(*FORBIDDEN[number]))
    assert found is None


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    8,
    2**40,
    2**63,
    2**64,
    1.5,
    "F32",
    "BF16",
    "F4",
    "x",
    "é",
    [],
    [0, 8],
    {},
]


def mutations(count: int) -> Iterator[bytes]:
    """Files whose header has changed values, changed bytes, or both."""
    chance = random.Random(7)  # noqa: S311 (a fixed sequence)
    for _ in range(count):
        table: dict[str, Any] = {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        }
        if chance.random() < 0.7:
            row = table[chance.choice([*table])]
            row[chance.choice([*row, "new"])] = chance.choice(VALUES)
        if chance.random() < 0.3:
            row = table[chance.choice("ab")]
            for part in ("shape", "data_offsets"):
                if isinstance(row[part], list) and row[part]:
                    row[part][chance.randrange(len(row[part]))] = chance.choice(VALUES)
        raw = bytearray(packed(json.dumps(table), 32))
        for _ in range(chance.choice([0, 0, 1, 2])):
            raw[chance.randrange(8, len(raw) - 32)] = chance.choice(b'{}[]":,0123456789aeF\\ \xff')
        yield bytes(raw)


def test_a_changed_header_is_read_as_the_library_reads_it(read: Callable[[bytes], tuple[Any, Any]]) -> None:
    outcomes = [read(raw) for raw in mutations(1500)]
    assert [(found, known) for found, known in outcomes if found != known] == []
    assert 150 < sum(known is not None for _, known in outcomes) < 1350
