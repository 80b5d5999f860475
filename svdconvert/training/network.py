"""The model that is trained: loaded by transformers or, where that has none, from `svdconvert.models`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdconvert.checkpoint.reader import open_checkpoint
from svdconvert.checkpoint.source import TensorSource
from svdconvert.errors import CheckpointError
from svdconvert.layout import Family, Layout
from svdconvert.naming import as_family

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_network(
    place: Path, layout: Layout, dtype: torch.dtype | None, *, trust_remote_code: bool = False
) -> nn.Module:
    """The causal language model of a directory or file in `dtype`, or as it is stored where that is None.

    Raises CheckpointError where it cannot be loaded.
    """
    if layout.family is not None:
        own: nn.Module = _own(layout.family).load(_tensors(place, layout.family), dtype)
        return own
    from transformers import AutoModelForCausalLM

    model: nn.Module = _load(
        AutoModelForCausalLM, place, dtype=dtype or "auto", trust_remote_code=trust_remote_code
    )
    return model


def load_tokenizer(
    place: Path, layout: Layout, *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory or file. Raises CheckpointError where there is none."""
    tokenizer: PreTrainedTokenizerBase
    if layout.family is not None:
        tokenizer = _own(layout.family).load_tokenizer(place, _tensors(place, layout.family))
        return tokenizer
    from transformers import AutoTokenizer

    if not any((place / name).exists() for name in _TOKENIZERS):
        raise CheckpointError(
            f"{place} holds no tokenizer ({', '.join(_TOKENIZERS)}); copy its files into the directory"
        )
    tokenizer = _load(AutoTokenizer, place, trust_remote_code=trust_remote_code)
    return tokenizer


def _own(family: Family) -> Any:
    """The module that makes the family's network."""
    return import_module(f"svdconvert.models.{family.name}")


def _tensors(place: Path, family: Family) -> TensorSource:
    return as_family(open_checkpoint(place), family.rules, str(place))


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
