"""The tokenizer of RWKV World: greedy, by bytes, with offsets."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdconvert.errors import CheckpointError, DataError, MissingPackageError
from svdconvert.models import world_tokenizer
from svdconvert.models.world_tokenizer import WorldTokenizer, load_tokenizer
from tests.models.oracle import needs_rwkv

LINES = r"""1 '\x00' 1
2 'a' 1
3 'ab' 2
4 'abcd' 4
5 b'\xe6\x97' 2
6 b'\xa5' 1
7 ' ' 1
8 'b' 1
9 'c' 1
10 '日本' 6
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text(LINES, encoding="utf-8")
    return tmp_path


def test_the_longest_token_wins(place: Path) -> None:
    tokenizer = load_tokenizer(place, 300)
    assert tokenizer.encode("abcabcdab") == [3, 9, 4, 3]
    assert tokenizer.encode("日本 日") == [10, 7, 5, 6]
    assert tokenizer.decode([10, 7, 5, 6, 0]) == "日本 日"
    assert tokenizer.decode([5]) == "\ufffd"


def test_offsets_count_characters(place: Path) -> None:
    tokenizer = load_tokenizer(place / "m.pth", 300)
    encoded = tokenizer("日本 日ab", add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == [10, 7, 5, 6, 3]
    assert encoded["offset_mapping"] == [(0, 2), (2, 3), (3, 3), (3, 4), (4, 6)]


def test_a_small_vocabulary_is_the_bytes() -> None:
    tokenizer = load_tokenizer(Path("nowhere"), 256)
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.decode(tokenizer.encode("日本")) == "日本"
    with pytest.raises(DataError, match="no token for the byte"):
        load_tokenizer(Path("nowhere"), 100).encode("é")


@needs_rwkv
def test_the_packages_vocabulary_is_used_if_there_is_none_next_to_the_model(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, 65536)
    wanted = [6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706]
    assert tokenizer.encode("The Eiffel tower is in the city of") == wanted


@needs_rwkv
@pytest.mark.parametrize("entries", [50277, 151936])
def test_the_packages_vocabulary_does_not_serve_a_model_of_another_size(entries: int) -> None:
    with pytest.raises(
        CheckpointError,
        match=f"65529, the model in nowhere has {entries} entries; put the vocabulary",
    ):
        load_tokenizer(Path("nowhere"), entries)


@needs_rwkv
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_every_text_comes_back(text: str) -> None:
    tokenizer = packaged()
    encoded = tokenizer(text)
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert [begin for begin, _ in encoded["offset_mapping"]] == sorted(
        begin for begin, _ in encoded["offset_mapping"]
    )


_PACKAGED: list[WorldTokenizer] = []


def packaged() -> WorldTokenizer:
    if not _PACKAGED:
        _PACKAGED.append(load_tokenizer(Path("nowhere"), 65536))
    return _PACKAGED[0]


def test_what_is_wrong_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "rwkv_vocab_v20230424.txt").write_text(LINES + "700 'x' 1\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokens up to 700, the model .* has 300 entries"):
        load_tokenizer(place, 300)
    (place / "rwkv_vocab_v20230424.txt").write_text("1 'a' 1\n2 __import__('os') 3\n")
    with pytest.raises(CheckpointError, match="line 2"):
        load_tokenizer(place, 300)
    (place / "rwkv_vocab_v20230424.txt").write_text(LINES, encoding="utf-8")
    with pytest.raises(CheckpointError, match="has 10 of 65529 tokens; fetch"):
        load_tokenizer(place, 65536)
    monkeypatch.setattr(world_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"svdconvert\[rwkv\]"):
        load_tokenizer(Path("nowhere"), 65536)
