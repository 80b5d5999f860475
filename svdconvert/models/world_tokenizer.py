"""The tokenizers of RWKV World and of byte-level models: greedy, by the longest token that matches.

Tokens are byte strings. The vocabulary is a text file with a line `id literal length` for every token; the
literal is a Python string or bytes literal. Id 0 is the end of a text and is not in the file.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from svdconvert.errors import CheckpointError, DataError, MissingPackageError, brief
from svdconvert.output.sidecars import vocabularies

END = 0
"""The token that ends a text."""
BYTES = 256
"""A vocabulary of at most this size is taken to be the bytes themselves."""

WORLD = "rwkv_vocab_v20230424.txt"
WORLD_TOKENS = 65529
WORLD_SIZE = 65536
"""The file of World's vocabulary, its number of tokens, and the vocabulary size of models trained on it."""

# Only a literal of text or of bytes: others, such as a long sum, take much time or memory to evaluate.
_LINE = re.compile(r"(?P<number>[0-9]{1,9}) (?P<literal>b?(['\"]).*\3) (?P<length>[0-9]{1,9})", re.DOTALL)


class WorldTokenizer:
    """Text to tokens and back, with the part of transformers' tokenizer interface that training uses."""

    eos_token_id = END
    pad_token_id = None
    bos_token = None
    eos_token = None
    chat_template = None
    added_tokens_decoder: Mapping[int, Any] = {}
    is_fast = True
    """It returns offsets."""

    def __init__(self, tokens: Mapping[bytes, int]) -> None:
        """`tokens` maps each token's bytes to its id."""
        self._ids = dict(tokens)
        self._tokens = {number: token for token, number in self._ids.items()}
        lengths: dict[int, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(known, reverse=True) for first, known in lengths.items()}

    def encode(self, text: str) -> list[int]:
        """Token ids. Raises DataError for a byte that no token starts with."""
        return [number for number, _ in self._split(text.encode())]

    def decode(self, ids: Iterable[int], **_: object) -> str:
        """The text of `ids`; invalid UTF-8 becomes replacement characters."""
        return b"".join(self._tokens.get(number, b"") for number in ids).decode(errors="replace")

    def __call__(self, text: str, **_: object) -> dict[str, list[Any]]:
        """`input_ids`, and in `offset_mapping` the characters (from, to) of each."""
        data = text.encode()
        # The character that each byte belongs to.
        characters = [index for index, letter in enumerate(text) for _ in letter.encode()]
        parts = list(self._split(data))
        begins = [characters[begin] for _, begin in parts] + [len(text)]
        offsets = list(pairwise(begins))
        return {"input_ids": [number for number, _ in parts], "offset_mapping": offsets}

    def _split(self, data: bytes) -> Iterable[tuple[int, int]]:
        """(id, first byte) of each token."""
        at = 0
        while at < len(data):
            for length in self._lengths.get(data[at], ()):
                number = self._ids.get(data[at : at + length])
                if number is not None:
                    yield number, at
                    at += length
                    break
            else:
                raise DataError(f"the vocabulary has no token for the byte {data[at : at + 1]!r}")


def load_tokenizer(path: Path, vocabulary: int) -> WorldTokenizer:
    """The tokenizer of a model (a directory or a .pth file) with `vocabulary` entries.

    Bytes if there are at most 256, else the vocabulary next to the model, else the one in the rwkv package.
    Raises CheckpointError if the file is damaged or belongs to another model, and MissingPackageError if
    there is none.
    """
    if vocabulary <= BYTES:
        return WorldTokenizer({bytes([number]): number for number in range(vocabulary)})
    file = next(iter(vocabularies(path if path.is_dir() else path.parent)), None) or _packaged()
    if file is None:
        raise MissingPackageError(
            f"{path} has no vocabulary next to it; put {WORLD} there, or install the "
            "package that contains it: pip install 'svdconvert[rwkv]'"
        )
    tokens = _read(file)
    # World's vocabulary would be accepted for a larger model, and be wrong.
    if max(tokens.values()) >= vocabulary or (len(tokens) == WORLD_TOKENS and vocabulary != WORLD_SIZE):
        raise CheckpointError(
            f"{file} has tokens up to {max(tokens.values())}, the model in {path} has {vocabulary} entries; "
            "put the vocabulary of this model next to it"
        )
    if file.name == WORLD and vocabulary == WORLD_SIZE and len(tokens) < WORLD_TOKENS:
        raise CheckpointError(f"{file} has {len(tokens)} of {WORLD_TOKENS} tokens; fetch the file again")
    return WorldTokenizer(tokens)


def _packaged() -> Path | None:
    """The vocabulary in the rwkv package, which is not imported because that changes settings of torch."""
    package = find_spec("rwkv")
    folders = list(package.submodule_search_locations or []) if package else []
    return next((file for folder in folders for file in vocabularies(Path(folder))), None)


def _read(file: Path) -> dict[bytes, int]:
    tokens: dict[bytes, int] = {}
    # Not splitlines(): that also splits at characters that are tokens.
    for line, raw in enumerate(file.read_bytes().rstrip(b"\n").split(b"\n"), 1):
        try:
            number, token = _token(raw.removesuffix(b"\r").decode("utf-8"))
            tokens[token] = number
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise CheckpointError(
                f"{file}, line {line}: {brief(raw)} is not a token; fetch the file again"
            ) from error
    return tokens


def _token(text: str) -> tuple[int, bytes]:
    """(id, bytes) of a line. Raises ValueError, SyntaxError, MemoryError or RecursionError for any other."""
    match = _LINE.fullmatch(text)
    if match is None:
        raise ValueError("no id, literal and length")
    value = ast.literal_eval(match["literal"])
    token: bytes = value.encode() if isinstance(value, str) else value
    if len(token) != int(match["length"]) or not token:
        raise ValueError(f"{len(token)} bytes")
    return int(match["number"]), token
