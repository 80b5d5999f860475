"""The model that is trained: loaded by transformers or, where that has none, from `svdconvert.models`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdconvert.checkpoint.renamed import as_family
from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.errors import CheckpointError
from svdconvert.layouts.base import Layout, LayoutFamily

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


def load_classifier(
    directory: Path, dtype: torch.dtype | None, labels: Sequence[str], seed: int, **options: bool
) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """The model of a directory with a head for `labels`, or for a number where there are none.

    Returns it with the shapes of the parameters that are to be trained whole: the head's, and those that the
    checkpoint does not have, drawn with `seed`. Raises CheckpointError where transformers cannot load it.
    """
    from transformers import AutoModelForSequenceClassification

    names = dict(enumerate(labels)) or {0: "LABEL_0"}
    with torch.random.fork_rng(devices=[]), _unreported():
        torch.manual_seed(seed)
        model, loaded = _load(
            AutoModelForSequenceClassification,
            directory,
            dtype=dtype or "auto",
            id2label=names,
            label2id={name: number for number, name in names.items()},
            problem_type="single_label_classification" if labels else "regression",
            output_loading_info=True,
            **options,
        )
    body = f"{model.base_model_prefix}."
    whole = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not name.startswith(body) or name in loaded["missing_keys"]
    }
    return model, whole


def head_config(model: nn.Module) -> dict[str, Any]:
    """What config.json says of the head of a model that `load_classifier` returned."""
    config: Any = model.config
    return {
        "architectures": [type(model).__name__],
        "id2label": {str(number): name for number, name in config.id2label.items()},
        "label2id": dict(config.label2id),
        "problem_type": config.problem_type,
    }


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


def _own(family: LayoutFamily) -> Any:
    """The module that makes the family's network."""
    return import_module(f"svdconvert.models.{family.name}")


def _tensors(place: Path, family: LayoutFamily) -> TensorSource:
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
def _unreported() -> Iterator[None]:
    """Without transformers' report of weights that are new: a new head is what was asked for."""
    from transformers.utils import logging

    theirs: Any = logging
    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)


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
