"""Does the network have all its weights from the checkpoint, and a row of the embedding for every token?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from svdconvert.errors import CheckpointError, DataError
from svdconvert.training.data.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A weight's name, its shape in the checkpoint and its shape in the network."""
_SHOWN = 3  # names in a sentence


def require_complete(
    directory: Path, model: nn.Module, loaded: Mapping[str, Any], notify: Callable[[str], None]
) -> None:
    """Raise CheckpointError if a weight of a language model is not from its checkpoint.

    `loaded` is the loading info of transformers, in which tied weights are not missing. Calls `notify` with a
    sentence on tensors that the network does not have.
    """
    _refuse_mismatches(directory, loaded["mismatched_keys"])
    _refuse_missing(directory, model, loaded["missing_keys"])
    if unused := sorted(loaded["unexpected_keys"]):
        notify(
            f"{directory} has tensors that {type(model).__name__} does not have and that are not trained: "
            f"{_some(unused)}"
        )


def require_complete_body(
    directory: Path, model: nn.Module, loaded: Mapping[str, Any], notify: Callable[[str], None]
) -> None:
    """Raise CheckpointError if a weight below the head, other than a pooler's, is not from the checkpoint.

    `loaded` is as in `require_complete`. The head is new, so that the heads of the checkpoint are not used.
    """
    body = f"{model.base_model_prefix}."
    _refuse_mismatches(directory, [entry for entry in loaded["mismatched_keys"] if entry[0].startswith(body)])
    missing = [name for name in loaded["missing_keys"] if name.startswith(body) and ".pooler." not in name]
    _refuse_missing(directory, model, missing)
    if unused := sorted(name for name in loaded["unexpected_keys"] if name.startswith(body)):
        notify(
            f"{directory} has tensors that {type(model).__name__} does not have and that are not trained: "
            f"{_some(unused)}"
        )


def _refuse_missing(directory: Path, model: nn.Module, missing: Iterable[str]) -> None:
    names = sorted(missing)
    if not names:
        return
    advice = "give a complete checkpoint"
    if any(name.startswith("lm_head.") for name in names):
        advice += ", or set tie_word_embeddings in its config.json if its head is the embedding"
    raise CheckpointError(
        f"{directory} does not have {_some(names)}, so {type(model).__name__} would be trained with random "
        f"values in place of that; {advice}"
    )


def _refuse_mismatches(directory: Path, mismatched: Iterable[Mismatch]) -> None:
    for name, stored, expected in sorted(mismatched):
        raise CheckpointError(
            f"{directory} has {name} in shape {tuple(stored)}, but its config.json describes "
            f"{tuple(expected)}; correct config.json, or give the checkpoint that belongs to it"
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def require_embedded(
    weights: Path, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", examples: Iterable[Example]
) -> None:
    """Raise DataError, which names the token, if a token of the examples has no row in the embedding."""
    rows = embedding_rows(model)
    image_token = image_token_id(model)
    # Some models replace the image token by another one before the embedding, so it needs no row there.
    ids = [example.input_ids[example.input_ids != image_token] for example in examples]
    largest = max((int(tokens.max()) for tokens in ids if len(tokens)), default=0)
    if largest < rows:
        return
    token = tokenizer.convert_ids_to_tokens(largest)
    raise DataError(
        f"the rows have the token {token!r} with id {largest}, but the embedding of {weights} has {rows} "
        "rows; give the tokenizer that belongs to the model, or resize the model's embedding"
    )


def embedding_rows(model: nn.Module) -> float:
    """The number of rows of the input embedding; infinity if it is not known."""
    get_embedding: Any = getattr(model, "get_input_embeddings", None)
    weight = getattr(get_embedding(), "weight", None) if get_embedding else None
    return inf if weight is None else int(weight.shape[0])


def require_image_tokens(
    weights: Path, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", examples: Iterable[Example]
) -> None:
    """Raise DataError if a row has an image without a token of the model for it, or such a token alone.

    A model that does not say which token stands for images is not checked.
    """
    expected = image_token_id(model)
    if expected is None:
        return
    token = tokenizer.convert_ids_to_tokens(expected) if expected < len(tokenizer) else None
    for example in examples:
        has_token = bool((example.input_ids == expected).any())
        if has_token and example.images is None:
            raise DataError(
                f"a row without an image has the token {token!r}, which stands for images in {weights}; "
                "remove it from the row's text"
            )
        if example.images is not None and not has_token:
            raise DataError(
                f"the processor of {weights} does not write the token with id {expected}, at which the model "
                "expects images; give the processor that belongs to the model"
            )


def image_token_id(model: nn.Module) -> int | None:
    """The token at whose positions a model expects images; None if it does not say."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((value for value in found if isinstance(value, int)), None)
