"""The model that is trained: loaded by transformers, with the weights that the method wants."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdconvert.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_network(directory: Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model of a directory in `dtype`, or as config.json says where that is None.

    Raises CheckpointError where transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    model: nn.Module = _load(
        AutoModelForCausalLM, directory, dtype=dtype or "auto", trust_remote_code=trust_remote_code
    )
    return model


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    if not any((directory / name).exists() for name in _TOKENIZERS):
        raise CheckpointError(
            f"{directory} holds no tokenizer ({', '.join(_TOKENIZERS)}); copy its files into the directory"
        )
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, directory, trust_remote_code=trust_remote_code)
    return tokenizer


def replace_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put other weights into linear layers, by their run-time paths; each takes the layer's dtype."""
    for path, weight in weights.items():
        parameter = model.get_submodule(path).get_parameter("weight")
        with torch.no_grad():
            parameter.copy_(weight)


def _load(kind: Any, directory: Path, **options: Any) -> Any:
    try:
        with _quiet():
            return kind.from_pretrained(directory, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = "the tokenizer" if "Tokenizer" in kind.__name__ else "the model"
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"transformers cannot load {what} of {directory}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars; its warnings stay."""
    from transformers.utils import logging

    theirs: Any = logging
    enabled = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            theirs.enable_progress_bar()
