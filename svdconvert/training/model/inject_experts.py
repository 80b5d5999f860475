"""Put the factors of experts into a network."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from svdconvert.checkpoint.parts import index_of, whole_name
from svdconvert.inputs.placed import Projection
from svdconvert.linalg.factors import Factors, factor_shapes
from svdconvert.manifest.place import Rows
from svdconvert.training.model.adapted_experts import AdaptedExperts
from svdconvert.training.model.expert_branch import ExpertBranch, Training

_STACKED = 3  # axes of a parameter of experts
Scaled = Mapping[str, tuple[Factors, float]]
Projections = Mapping[str, Projection] | None


def is_expert(name: str, projections: Projections) -> bool:
    """True if this name in an adapter is that of an expert."""
    return index_of(name) is not None or name in (projections or {})


def _projection(name: str, projections: Projections) -> Projection:
    if projections and name in projections:
        return projections[name]
    return Projection(name, whole_name(name), index_of(name) or 0, None)


@dataclass
class _Group:
    """Experts whose factors have the same place in their matrices, and the same rank and scale."""

    rows: Rows | None
    scale: float
    names: dict[int, str] = field(default_factory=dict)
    factors: list[Factors] = field(default_factory=list)


def inject_experts(
    model: nn.Module, adapters: Scaled, training: Training, projections: Projections = None
) -> None:
    """Replace modules of experts by AdaptedExperts. The factors must fit (see `expert_problems`)."""
    groups: dict[str, dict[str, dict[tuple[Rows | None, float, int], _Group]]] = {}
    for name, (factors, scale) in adapters.items():
        one = _projection(name, projections)
        module, _, parameter = one.parameter.rpartition(".")
        key = (one.rows, scale, factors.rank)
        found = groups.setdefault(module, {}).setdefault(parameter, {})
        group = found.setdefault(key, _Group(one.rows, scale))
        group.names[one.expert] = name
        group.factors.append(factors)
    for path, parameters in groups.items():
        base = model.get_submodule(path)
        parent, _, attribute = path.rpartition(".")
        branches = {
            parameter: [
                ExpertBranch(
                    group.names,
                    group.factors,
                    group.scale,
                    group.rows,
                    training,
                    base.get_parameter(parameter).device,
                )
                for group in found.values()
            ]
            for parameter, found in parameters.items()
        }
        setattr(model.get_submodule(parent), attribute, AdaptedExperts(base, branches))


def expert_problems(
    modules: Mapping[str, nn.Module], adapters: Scaled, trains: frozenset[str], projections: Projections
) -> Iterator[str]:
    """Why the factors of experts do not fit the model: one sentence for each."""
    for name, (factors, _) in adapters.items():
        one = _projection(name, projections)
        path, _, attribute = one.parameter.rpartition(".")
        weight = getattr(modules.get(path), attribute, None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != _STACKED:
            yield f"{name}: the model has no parameter {one.parameter} of experts"
            continue
        transposed = bool(getattr(modules[path], "is_transposed", False))
        count, rows, columns = weight.mT.shape if transposed else weight.shape
        rows = one.rows.size if one.rows else rows
        expected = factor_shapes(rows, columns, factors.rank)
        shapes = {piece: tuple(tensor.shape) for piece, tensor in factors.pieces().items()}
        if one.expert >= count:
            yield f"{name}: the model has {count} experts"
        elif wrong := [piece for piece, shape in shapes.items() if shape != expected[piece]]:
            yield f"{name}: {wrong[0]} is {shapes[wrong[0]]} instead of {expected[wrong[0]]}"
        elif absent := sorted(trains - shapes.keys()):
            yield f"{name}: there is no {absent[0]} to train"
