"""What is trained whole beside the adapter: norms, biases, or whatever is named."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import RecipeError
from svdconvert.layouts.base import Layout
from svdconvert.training.model.adapted_linear import AdaptedLinear

_NORM = re.compile(r"(^|\.)([^.]*norm[^.]*|ln\w*)\.(weight|bias)")
Shapes = Mapping[str, tuple[int, ...]]
"""Of the chosen parameters, by their path at run time."""


def choose(
    infos: Mapping[str, TensorInfo], layout: Layout, adapted: Collection[str], wanted: Sequence[str]
) -> Shapes:
    """The parameters that `wanted` names: norms, biases, or globs on the names of tensors.

    `adapted` are the tensors with factors. Raises RecipeError where one of them names nothing, or what
    cannot be trained whole.
    """
    found: dict[str, tuple[int, ...]] = {}
    for target in wanted:
        names = [name for name in infos if _names(target, name, layout)]
        if not names:
            raise RecipeError(
                f"train_also names {target!r}, which no tensor fits; give {_words(layout)}, or globs on names"
            )
        for name in names:
            if name in adapted:
                raise RecipeError(f"train_also names {name}, which the adapter trains already; leave it out")
            if name.endswith("embed_tokens.weight") and not any("head" in other for other in infos):
                raise RecipeError(f"train_also names {name}, which is the head's weight too; leave it out")
            found[layout.runtime_name(name)] = infos[name].shape
    return found


def _words(layout: Layout) -> str:
    return ", ".join(layout.family.groups if layout.family else ("norms", "biases"))


def _names(target: str, name: str, layout: Layout) -> bool:
    if layout.family and target in layout.family.groups:
        return all(
            re.fullmatch(layout.family.groups[target], own) for own in layout.rename_rule(name).canonical
        )
    if target == "norms":
        return _NORM.search(name) is not None
    return name.endswith(".bias") if target == "biases" else fnmatchcase(name, target)


def unfreeze(model: nn.Module, parameters: Iterable[str], layout: Layout) -> None:
    """Have these trained, in float32, for a small step is nothing to a bfloat16 number."""
    for name in parameters:
        for own in layout.rename_rule(name).canonical:
            parameter = _live(model, own)
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def extract_parameters(model: nn.Module, parameters: Shapes, layout: Layout) -> dict[str, Tensor]:
    """What has become of them: float32 copies on the CPU, in their shapes on disk."""
    found = {}
    for name, shape in parameters.items():
        rule = layout.rename_rule(name)
        live = [_live(model, own).detach() for own in rule.canonical]
        value = rule.to_layout(live) if rule.to_layout else live[0]
        found[name] = value.to("cpu", torch.float32, copy=True).reshape(shape).contiguous()
    return found


def _live(model: nn.Module, name: str) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return (module.base if isinstance(module, AdaptedLinear) else module).get_parameter(leaf)
