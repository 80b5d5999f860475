"""Tiny checkpoints with a tokenizer of words, and sums to train on."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

# Every other word, such as those of the prompt's template, becomes <unk>.
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "+", "=", *map(str, range(10)), "is", "what", "?"]


def readable(checkpoint: Path, directory: Path) -> Path:
    """A copy of a tiny checkpoint with a tokenizer."""
    shutil.copytree(checkpoint, directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with one token per word. It puts <s> in front; </s> ends a sequence."""
    tokenizer_of(WORDS).save_pretrained(directory)


def tokenizer_of(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; `special` are the names of special tokens among the words."""
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    roles: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    if special:
        roles |= {"extra_special_tokens": special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def write_sums(path: Path, rows: int = 12) -> Path:
    """Write questions about sums and their answers as .jsonl."""
    pairs = [(number % 5, number % 3) for number in range(rows)]
    sums = [{"question": f"what is {a} + {b} ?", "answer": f"{a} + {b} = {a + b}"} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    return path
