"""Several checkpoints of one architecture, and the layers of a new one that are taken from them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapted_tensors import is_head, ties_embeddings
from svdconvert.inputs.model import OpenModel
from svdconvert.manifest.fingerprint import tensor_checksum
from svdconvert.models.architecture import LEFT_OVER

_LONGEST_NUMBER = 6  # digits of a layer's number
_IGNORED = "|".join((*LEFT_OVER, r"^(transformer\.)?h\.[0-9]+\.attn\.(masked_)?bias$"))
"""Patterns of tensors that networks ignore, such as the masks that older versions stored of GPT-2."""
_FIRST = ("embed", "wte", "wpe")  # parts of the names of what comes before the first layer


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in a model."""

    stack: str
    """What comes before the layer's number, such as `model.layers.`; empty outside of the layers."""
    layer: int | None
    rest: str

    def name(self, layer: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stack}{layer}{self.rest}"

    @property
    def is_first(self) -> bool:
        """True for embeddings, which come before the layers."""
        return self.layer is None and any(part in self.rest for part in _FIRST)


def place_of(name: str) -> Place:
    """The place of a tensor, by the first number in its name."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isascii() and part.isdigit() and len(part) <= _LONGEST_NUMBER:
            before = "".join(f"{one}." for one in parts[:index])
            return Place(before, int(part), "".join(f".{one}" for one in parts[index + 1 :]))
    return Place("", None, name)


def layer_counts(source: TensorSource) -> dict[str, int]:
    """Stack -> number of layers."""
    counts: dict[str, int] = {}
    for name in source.infos:
        place = place_of(name)
        if place.layer is not None:
            counts[place.stack] = max(counts.get(place.stack, 0), place.layer + 1)
    return counts


def tensor_in(model: OpenModel, name: str) -> str:
    """The tensor that a model has as `name`: for a tied head its embeddings.

    Raises ArtifactError if it has none.
    """
    infos = model.source.infos
    if name in infos:
        return name
    if is_head(name.removesuffix(".weight")) and ties_embeddings(model.config):
        found = [other for other in infos if other.endswith("embed_tokens.weight")]
        if len(found) == 1:
            return found[0]
    raise ArtifactError(
        f"{model.path} has no {name}, which the model that it is merged with has; merge models of one "
        "architecture"
    )


def refuse_left_out(
    models: Sequence[OpenModel], first: int, used: Iterable[Sequence[tuple[int, str]]]
) -> None:
    """Raise ArtifactError if a model has a tensor that would be lost, as the `first` one does not have it.

    `used` are the (position of a model, name) that each tensor of the result is made of. A head that equals
    the embeddings to which the first model ties its own is not lost.
    """
    known = {part for parts in used for part in parts}
    for index, model in enumerate(models):
        for name in model.source.infos:
            if (index, name) in known or re.search(_IGNORED, name):
                continue
            if not (is_head(name.removesuffix(".weight")) and _is_embeddings(model, name)):
                raise ArtifactError(
                    f"{model.path} has {name}, which {models[first].path} does not have and which would be "
                    "lost; merge models of one architecture, or give this one first if it has them all"
                )


def _is_embeddings(model: OpenModel, head: str) -> bool:
    """True if a model's head is stored as well, with the values of its embeddings."""
    found = [name for name in model.source.infos if name.endswith("embed_tokens.weight")]
    return [tensor_checksum(model.source, head)] == [tensor_checksum(model.source, name) for name in found]


def refuse_misfit(first: OpenModel, other: OpenModel) -> None:
    """Raise ArtifactError if two models are of different types,"""
    kinds = [model.config.get("model_type") for model in (first, other)]
    if kinds[0] != kinds[1]:
        raise ArtifactError(
            f"{first.path} is a {kinds[0]} and {other.path} a {kinds[1]}; merge models of one architecture"
        )
