"""Headers, compared with the safetensors library in both directions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load, save

from svdconvert.checkpoint.header import build_header, header_length, parse_header
from svdconvert.checkpoint.tensors import ELEMENTS, TensorInfo, torch_dtype
from svdconvert.errors import CheckpointError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
GOOD = json.loads(save(TENSORS)[8:].split(b"}}")[0] + b"}}")
CODES = [
    code for code, (_, name) in ELEMENTS.items() if isinstance(getattr(torch, name or "-", None), torch.dtype)
]


def parse(raw: bytes) -> dict[str, TensorInfo]:
    length = header_length(raw[:8], "f", len(raw))
    return {extent.info.name: extent.info for extent in parse_header(raw[8 : 8 + length], "f", len(raw))}


def packed(header: Any, data: int = 32) -> bytes:
    """A file with this header and `data` bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def changed(**entry: Any) -> bytes:
    """The good file with its first entry changed."""
    return packed({**GOOD, "a": {**GOOD["a"], **entry}})


def test_the_parts_of_this_test_make_a_good_file() -> None:
    assert parse(packed(GOOD)).keys() == load(packed(GOOD)).keys() == TENSORS.keys()


@pytest.mark.parametrize("code", CODES)
def test_every_element_type_is_read_as_the_library_wrote_it(code: str) -> None:
    tensor = torch.zeros(3, 4, dtype=torch_dtype(code))
    info = parse(save({"x": tensor}))["x"]
    stored = tensor.untyped_storage().nbytes()
    assert (info.dtype, info.nbytes) == (code, stored)
    if code != "F4":  # two elements in one of torch's
        assert info.shape == (3, 4)


@pytest.mark.parametrize("code", CODES)
def test_the_library_reads_what_is_built(code: str) -> None:
    infos = [
        TensorInfo("z", (3, 4), code),
        TensorInfo("empty", (0, 7), code),
        TensorInfo("two words é", (2,), code),
    ]
    head, offsets = build_header(infos)
    raw = head + bytes(sum(info.nbytes for info in infos))
    known = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in deserialize(raw)}
    assert list(parse(raw)) == ["z", "empty", "two words é"]
    assert known == {info.name: (info.shape, info.dtype) for info in infos}
    assert offsets == {
        "z": len(head),
        "empty": len(head) + infos[0].nbytes,
        "two words é": len(head) + infos[0].nbytes,
    }


def test_metadata_is_exactly_the_format_and_the_header_is_padded(tmp_path: Path) -> None:
    head, _ = build_header([TensorInfo("x", (1,), "F32")])
    (tmp_path / "f").write_bytes(head + bytes(4))
    with safe_open(tmp_path / "f", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(head) % 8 == 0


BAD = {
    "not JSON": packed(b"{]"),
    "not text": packed(b"\xff\xfe{}"),
    "a list": packed(b"[]"),
    "nested too deeply": packed(b"[" * 200_000),
    "an entry that is a list": packed({**GOOD, "a": []}),
    "an entry without a shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 32]}}),
    "three offsets": changed(data_offsets=[0, 24, 32]),
    "a shape that is no list": changed(shape=6),
    "a negative shape": changed(shape=[-2, -3]),
    "a fraction in the shape": changed(shape=[2.0, 3]),
    "true in the shape": packed({"a": {"dtype": "F32", "shape": [True, 8], "data_offsets": [0, 32]}}),
    "an unknown element type": changed(dtype="F33"),
    "an element type that is a list": changed(dtype=["F32"]),
    "a shape that is larger than its bytes": changed(shape=[2, 4]),
    "an end before its begin": changed(data_offsets=[24, 0]),
    "offsets that overlap": packed({**GOOD, "b": {**GOOD["b"], "data_offsets": [16, 24]}}),
    "a gap": packed({**GOOD, "b": {**GOOD["b"], "data_offsets": [26, 34]}}, data=34),
    "two tensors at the same offset": packed({**GOOD, "c": GOOD["a"]}),
    "bytes past the end": packed(GOOD, data=31),
    "bytes that belong to no tensor": packed(GOOD, data=33),
    "an empty file": b"",
    "four bytes": b"\0\0\0\0",
    "a length past the end": (10**6).to_bytes(8, "little") + b"{}",
    "a length of exabytes": (2**63).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("what", BAD)
def test_an_inconsistent_header_is_refused_as_the_library_refuses_it(what: str) -> None:
    with pytest.raises(CheckpointError, match="f"):
        parse(BAD[what])
    with pytest.raises(SafetensorError):
        load(BAD[what])


def agrees_with_the_library(raw: bytes) -> None:
    """A header that is not refused with a CheckpointError has the same shapes for the library."""
    try:
        found = parse(raw)
    except CheckpointError:
        return
    known = load(raw)
    assert {name: info.shape for name, info in found.items()} == {
        name: tuple(t.shape) for name, t in known.items()
    }


VALUES = st.one_of(st.integers(-2, 40), st.sampled_from([None, True, "F32", "BF16", 1.0, 2**70, [], {}]))
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "U8", "F4", "BOOL"]), VALUES),
        "shape": st.one_of(st.lists(VALUES, max_size=3), VALUES),
        "data_offsets": st.one_of(st.lists(VALUES, min_size=2, max_size=2), VALUES),
    },
)


@given(entry=ENTRIES, rest=st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_entry_is_accepted_that_the_library_refuses(entry: dict[str, Any], rest: bool) -> None:
    agrees_with_the_library(packed({**GOOD, "a": {**GOOD["a"], **entry}} if rest else {"a": entry}))


@given(change=st.tuples(st.integers(0, 120), st.integers(0, 255)))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_changed_byte_raises_nothing_but_a_checkpoint_error(change: tuple[int, int]) -> None:
    raw = bytearray(save(TENSORS))
    raw[change[0]] = change[1]
    agrees_with_the_library(bytes(raw))


@pytest.mark.parametrize("cut", [lambda raw: raw[:-1], lambda raw: raw[:20], lambda raw: raw + b"\0"])
def test_a_file_of_another_size_is_refused(cut: Callable[[bytes], bytes]) -> None:
    with pytest.raises(CheckpointError, match="truncated|complete|longer"):
        parse(cut(save(TENSORS)))
