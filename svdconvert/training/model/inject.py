"""Put adapters into a model, and read their factors back."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from svdconvert.errors import ArtifactError
from svdconvert.inputs.placed import Projection
from svdconvert.linalg.factors import Factors, factor_shapes
from svdconvert.training.model.adapted_linear import AdaptedLinear
from svdconvert.training.model.conv1d import as_linear
from svdconvert.training.model.expert_branch import ExpertBranch, Training
from svdconvert.training.model.inject_experts import expert_problems, inject_experts, is_expert

ScaledFactors = Mapping[str, tuple[Factors, float]]
"""Name of a linear layer in the adapter -> (factors, scale)."""


def inject_adapters(  # noqa: PLR0913 (what is injected, where to, and how it is trained)
    model: nn.Module,
    adapters: ScaledFactors,
    trains: frozenset[str],
    dropout: float = 0.0,
    *,
    corrected: bool = False,
    paths: Mapping[str, str] | None = None,
    projections: Mapping[str, Projection] | None = None,
) -> None:
    """Replace linear layers by AdaptedLinear layers, experts by AdaptedExperts, and freeze everything else.

    `trains` names the trained factors, of "lora_A", "lora_B", "lora_S" and "lora_R"; `corrected` is as in
    AdaptedLinear. `paths` maps the name of a layer in the adapter to its path in the model, if they differ;
    `projections` are the places of experts with factors of their own.
    Raises ArtifactError that lists every misfit, and then leaves the model unchanged.
    """
    # remove_duplicate=False: a module that several paths share is listed under each of them.
    modules = dict(model.named_modules(remove_duplicate=False))
    experts = {name: adapter for name, adapter in adapters.items() if is_expert(name, projections)}
    single = {name: adapter for name, adapter in adapters.items() if name not in experts}
    path_of = {name: (paths or {}).get(name, name) for name in single}
    by_path = {path_of[name]: adapter for name, adapter in single.items()}
    problems = list(_problems(modules, by_path, trains)) if single or not experts else []
    if problems := [*problems, *expert_problems(modules, experts, trains, projections)]:
        raise ArtifactError("the adapter does not fit the model:\n  " + "\n  ".join(problems))
    model.requires_grad_(False)
    inject_experts(model, experts, Training(trains=trains, dropout=dropout, corrected=corrected), projections)
    for name, (factors, scale) in single.items():
        base = as_linear(modules[path_of[name]])
        assert isinstance(base, nn.Linear)
        parent, _, attribute = path_of[name].rpartition(".")
        layer = AdaptedLinear(base, factors, scale, trains, dropout, corrected=corrected)
        layer.name = name
        setattr(modules[parent], attribute, layer)


def _problems(
    modules: Mapping[str, nn.Module], adapters: ScaledFactors, trains: frozenset[str]
) -> Iterable[str]:
    if not adapters:
        yield "it has no layer"
    for path, (factors, _) in adapters.items():
        module = modules.get(path)
        if module is None:
            yield f"{path}: the model has no such module"
        elif not isinstance(module := as_linear(module), nn.Linear):
            yield f"{path}: is not a linear layer but {type(module).__name__}"
        elif wrong := _shape_problems(module, factors, trains):
            yield f"{path}: {wrong}"


def _shape_problems(base: nn.Linear, factors: Factors, trains: frozenset[str]) -> str:
    """Why these factors do not fit this layer; empty if they do."""
    shapes = {name: tuple(tensor.shape) for name, tensor in factors.pieces().items()}
    expected = factor_shapes(base.out_features, base.in_features, factors.rank)
    problems = [
        f"{name} is {shape} instead of {expected[name]}"
        for name, shape in shapes.items()
        if shape != expected[name]
    ]
    problems += [f"there is no {name} to train" for name in sorted(trains - shapes.keys())]
    return ", ".join(problems)


def extract_factors(model: nn.Module) -> dict[str, Factors]:
    """Name in the adapter -> float32 copy of the current factors on the CPU, for every adapted matrix."""
    return {
        name: Factors.of(
            {piece: tensor.to("cpu", torch.float32, copy=True) for piece, tensor in factors.pieces().items()}
        )
        for name, factors, _ in live_factors(model)
    }


def trainable_count(model: nn.Module) -> int:
    """The number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def live_factors(model: nn.Module) -> Iterator[tuple[str, Factors, float]]:
    """(name in the adapter, factors, scale) for every adapted matrix; the factors change in training."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            yield module.name, module.live_factors(), module.scale
        elif isinstance(module, ExpertBranch):
            for name, factors in module.live_factors().items():
                yield name, factors, module.scale


def adapted_layers(model: nn.Module) -> Iterable[tuple[str, AdaptedLinear]]:
    """(name in the adapter, layer) for every adapted linear layer."""
    return ((layer.name, layer) for layer in model.modules() if isinstance(layer, AdaptedLinear))
