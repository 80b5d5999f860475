"""Finds the tensors of a model that an adapter changes, also if the adapter has names of another program."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel
from svdconvert.layouts.base import Layout

# Modules that only contain the body of a model: versions of transformers, and a body that is saved without
# its head, differ in them.
_CONTAINERS = re.compile(r"^(?:(?:model|language_model|text_model)\.)+")
HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class TensorNames:
    """The names at run time of a model's tensors."""

    layout: Layout
    infos: Mapping[str, TensorInfo]

    @cached_property
    def _exact(self) -> dict[str, str]:
        names = {self.layout.runtime_name(name): name for name in self.infos}
        slots = self.layout.slots(self.infos)
        # An adapter made for another layout of a family has the names of the family's network.
        if self.layout.family is not None:
            names |= {f"{self.layout.network_path(name)}.weight": name for name in slots}
        return names | {f"{slot.module}.weight": name for name, slot in slots.items()}

    @cached_property
    def _without_containers(self) -> dict[str, str]:
        """As `_exact`, without containers; names that are the same without them are left out."""
        found: dict[str, set[str]] = {}
        for parameter, name in self._exact.items():
            found.setdefault(without_containers(parameter), set()).add(name)
        return {parameter: min(names) for parameter, names in found.items() if len(names) == 1}

    def tensor(self, parameter: str) -> str | None:
        """The tensor that is the parameter with this name at run time; None if there is none."""
        return self._exact.get(parameter) or self._without_containers.get(without_containers(parameter))


def adapted_tensors(delta: AdapterDelta, model: OpenModel) -> dict[str, str]:
    """Module -> tensor of `model`, for every module that the adapter has factors for.

    It need not be a matrix of the layout: heads, routers and vision towers are linear layers too. Raises
    ArtifactError if the model has no such matrix, or if it is the model's tied head.
    """
    infos = model.source.infos
    _, layout = model.layout(delta.layout_name)
    names = TensorNames(layout, infos)
    found: dict[str, str] = {}
    absent: list[str] = []
    for module in delta.modules:
        tensor = names.tensor(f"{module}.weight")
        if is_head(module) and (tensor is None or ties_embeddings(model.config)):
            raise ArtifactError(
                f"{delta.directory} adapts {module}, which {model.path} ties to its embeddings: merging "
                "would change the embeddings too; merge it with PEFT into a model whose embeddings are "
                "not tied, or train without it"
            )
        if tensor is None:
            absent.append(module)
        else:
            found[module] = tensor
    if absent:
        raise ArtifactError(
            f"{delta.directory} adapts {absent[0]}, which {model.path} does not have ({len(absent)} such "
            "modules); give the model that it was made for"
        )
    _refuse_same_tensor(delta, found)
    return found


def is_head(module: str) -> bool:
    """True for the module that makes logits of the last hidden state."""
    return module.rpartition(".")[2] in HEADS


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """True if a config.json says that the head is tied to the embeddings."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    return config.get("tie_word_embeddings", nested) is True


def _refuse_same_tensor(delta: AdapterDelta, found: Mapping[str, str]) -> None:
    modules: dict[str, str] = {}
    for module, tensor in found.items():
        if tensor in modules:
            raise ArtifactError(
                f"{delta.directory} has two adapters of {tensor}: {modules[tensor]} and {module}; remove one"
            )
        modules[tensor] = module


def without_containers(parameter: str) -> str:
    """The name without the modules that only contain a model's body, which versions of a model differ in."""
    return _CONTAINERS.sub("", parameter)
