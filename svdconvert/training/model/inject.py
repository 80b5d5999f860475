"""Putting adapters into a model, and taking them out again."""

from collections.abc import Iterable, Mapping

from torch import nn

from svdconvert.errors import ArtifactError
from svdconvert.linalg.factors import Factors, factor_shapes
from svdconvert.training.model.adapted_linear import AdaptedLinear

Pieces = Mapping[str, tuple[Factors, float]]
"""(factors, scale) by the name of the linear layer that they belong to, which is its run-time path unless
`install` is told another."""


def install(
    model: nn.Module,
    pieces: Pieces,
    trains: frozenset[str],
    dropout: float = 0.0,
    *,
    corrected: bool = False,
    paths: Mapping[str, str] | None = None,
) -> None:
    """Replace the linear layers of these names by adapted ones and freeze everything else.

    `trains` names the pieces to train, of "lora_A", "lora_B", "lora_S", "lora_R"; `corrected` is as in
    AdaptedLinear; `paths` says where the layers are, by name. Raises ArtifactError with all that does not
    fit, and leaves the model alone then.
    """
    # A module shared by several paths is listed under each of them.
    modules = dict(model.named_modules(remove_duplicate=False))
    at = {name: (paths or {}).get(name, name) for name in pieces}
    if wrong := list(_complaints(modules, {at[name]: piece for name, piece in pieces.items()}, trains)):
        raise ArtifactError("the adapter does not fit the model:\n  " + "\n  ".join(wrong))
    model.requires_grad_(False)
    for name, (factors, scale) in pieces.items():
        base = modules[at[name]]
        assert isinstance(base, nn.Linear)
        parent, _, last = at[name].rpartition(".")
        layer = AdaptedLinear(base, factors, scale, trains, dropout, corrected=corrected)
        layer.name = name
        setattr(modules[parent], last, layer)


def _complaints(modules: Mapping[str, nn.Module], pieces: Pieces, trains: frozenset[str]) -> Iterable[str]:
    if not pieces:
        yield "it has no layer"
    for path, (factors, _) in pieces.items():
        module = modules.get(path)
        if module is None:
            yield f"{path}: the model has no such module"
        elif not isinstance(module, nn.Linear):
            yield f"{path}: is not a linear layer but {type(module).__name__}"
        else:
            wrong = _misfit(module, factors, trains)
            if wrong:
                yield f"{path}: {wrong}"


def _misfit(base: nn.Linear, factors: Factors, trains: frozenset[str]) -> str:
    """What keeps these factors from this layer, empty where nothing does."""
    have = {name: tuple(piece.shape) for name, piece in factors.pieces().items()}
    want = factor_shapes(base.out_features, base.in_features, factors.rank)
    wrong = [
        f"{name} is {shape} instead of {want[name]}" for name, shape in have.items() if shape != want[name]
    ]
    wrong += [f"there is no {name} to train" for name in sorted(trains - have.keys())]
    return ", ".join(wrong)


def extract_factors(model: nn.Module) -> dict[str, Factors]:
    """The factors of every adapted layer by its name, as float32 copies on the CPU."""
    return {path: layer.factors() for path, layer in adapted_layers(model)}


def trainable_count(model: nn.Module) -> int:
    """Number of values that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapted_layers(model: nn.Module) -> Iterable[tuple[str, AdaptedLinear]]:
    """Every adapted layer with its name."""
    return ((layer.name, layer) for layer in model.modules() if isinstance(layer, AdaptedLinear))
