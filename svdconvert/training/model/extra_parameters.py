"""Parameters that are trained in full in addition to the adapter: norms, biases, or any that are named."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.layouts.base import Layout
from svdconvert.training.model.adapted_experts import AdaptedExperts
from svdconvert.training.model.adapted_linear import AdaptedLinear

_NORM = re.compile(r"(^|\.)([^.]*norm[^.]*|ln\w*)\.(weight|bias)")
ParameterShapes = Mapping[str, tuple[int, ...]]
"""Path of a parameter at run time -> its shape on disk."""


def choose_parameters(
    infos: Mapping[str, TensorInfo], layout: Layout, adapted: Collection[str], targets: Sequence[str]
) -> ParameterShapes:
    """The parameters that `targets` name: "norms", "biases", or globs on the names of tensors.

    `adapted` are the tensors with an adapter. Raises RecipeError if a target matches nothing, or a tensor
    that cannot be trained in full.
    """
    chosen: dict[str, tuple[int, ...]] = {}
    for target in targets:
        names = [name for name in infos if _matches(target, name, layout)]
        if not names:
            raise RecipeError(
                f"`train_also` names {target!r}, which matches no tensor; give {_group_names(layout)}, "
                "or a glob on tensor names"
            )
        for name in names:
            if name in adapted:
                raise RecipeError(
                    f"`train_also` names {name}, which the adapter trains already; leave it out"
                )
            if name.endswith("embed_tokens.weight") and not any("head" in other for other in infos):
                raise RecipeError(f"`train_also` names {name}, which is also the head's weight; leave it out")
            chosen[layout.runtime_name(name)] = infos[name].shape
    return chosen


def _group_names(layout: Layout) -> str:
    return ", ".join(layout.family.groups if layout.family else ("norms", "biases"))


def _matches(target: str, name: str, layout: Layout) -> bool:
    if layout.family and target in layout.family.groups:
        pattern = layout.family.groups[target]
        return all(re.fullmatch(pattern, own) for own in layout.rename_rule(name).canonical)
    if target == "norms":
        return _NORM.search(name) is not None
    return name.endswith(".bias") if target == "biases" else fnmatchcase(name, target)


def unfreeze(model: nn.Module, parameters: Iterable[str], layout: Layout) -> None:
    """Make parameters trainable, in float32: bfloat16 would round small updates away."""
    for name in parameters:
        for own in layout.rename_rule(name).canonical:
            parameter = _parameter_at(model, own)
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def extract_parameters(model: nn.Module, parameters: ParameterShapes, layout: Layout) -> dict[str, Tensor]:
    """The current values of parameters: float32 copies on the CPU, in their shapes on disk."""
    values = {}
    for name, shape in parameters.items():
        rule = layout.rename_rule(name)
        live = [_parameter_at(model, own).detach() for own in rule.canonical]
        value = rule.to_layout(live) if rule.to_layout else live[0]
        values[name] = value.to("cpu", torch.float32, copy=True).reshape(shape).contiguous()
    return values


def fill_parameters(model: nn.Module, values: Mapping[str, Tensor], layout: Layout) -> None:
    """Give parameters values as `extract_parameters` returns them; their dtypes and devices stay.

    Raises ArtifactError if the model has no such parameter, or one of another size.
    """
    for name, value in values.items():
        rule = layout.rename_rule(name)
        parts = rule.to_canonical(value) if rule.to_canonical else [value]
        for own, part in zip(rule.canonical, parts, strict=True):
            try:
                parameter = _parameter_at(model, own).detach()
                parameter.copy_(part.reshape(parameter.shape))
            except (AttributeError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ArtifactError(
                    f"{name} of the adapter does not fit the model ({reason}); give the base that the "
                    "adapter was made for"
                ) from error


def _parameter_at(model: nn.Module, name: str) -> nn.Parameter:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return (module.base if isinstance(module, AdaptedLinear | AdaptedExperts) else module).get_parameter(
        attribute
    )
