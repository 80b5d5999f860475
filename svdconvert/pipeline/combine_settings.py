"""Which merge method the options of `combine` select, and with which parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

from svdconvert.config.combine import CombineOptions
from svdconvert.errors import RecipeError, did_you_mean
from svdconvert.merging.base import MERGES, Input, MergeMethod, Settings, Value

DEFAULTS: Mapping[Input, str] = {"adapters": "sum", "checkpoints": "linear"}
"""The method that is used if none is given."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A merge method and the values of its parameters, the same for all tensors."""

    name: str
    method: MergeMethod
    each: Mapping[str, tuple[Value, ...]]
    """Parameter -> one value for each model."""
    shared: Mapping[str, Value]
    seed: int

    def settings(self, name: str, shape: tuple[int, ...], rank: int | None = None) -> Settings:
        """The settings for one tensor."""
        return Settings(shape=shape, each=self.each, shared=self.shared, rank=rank, name=name, seed=self.seed)


def find_method(name: str, kind: Input) -> MergeMethod:
    """The method `name` for adapters or checkpoints. Raises UnknownNameError, RecipeError."""
    method = MERGES.get(name)
    if kind not in method.takes:
        known = [other for other in MERGES.names() if kind in MERGES.load_all()[0][other].takes]
        raise RecipeError(f"the method {name} does not merge {kind}; use one of {', '.join(known)}")
    return method


def choose(options: CombineOptions, kind: Input, models: int) -> Chosen:
    """The method and its parameters for `models` inputs.

    Raises RecipeError for a parameter that the method does not have or that changes nothing, and for a
    wrong number of weights or inputs.
    """
    name = options.method or DEFAULTS[kind]
    method = find_method(name, kind)
    check_count(name, method, models)
    given: dict[str, object] = dict(options.set or {})
    if options.density is not None:
        given["density"] = options.density
    if kind == "checkpoints" and options.rank is not None:
        given["rank"] = float(options.rank)
    _refuse_unknown(name, method, given, options)
    density = method.parameter("density")
    keeps_all = density is not None and given.get("density", density.default) == 1.0
    if options.seed and (not method.draws or keeps_all):
        why = "all entries are kept" if method.draws else f"{name} draws no random numbers"
        raise RecipeError(f"--seed changes nothing here: {why}; leave it out")
    each: dict[str, tuple[Value, ...]] = {"weight": _weights(name, method, options, models)}
    shared: dict[str, Value] = {}
    for parameter in method.parameters:
        value = parameter.check(given.get(parameter.name, parameter.default), name)
        if not parameter.per_model:
            shared[parameter.name] = value
        elif parameter.name != "weight":
            each[parameter.name] = (value,) * models
    return Chosen(name=name, method=method, each=each, shared=shared, seed=options.seed)


def check_count(name: str, method: MergeMethod, models: int) -> None:
    """Raise RecipeError if a method merges more or fewer models, not counting the base."""
    if models < method.least or (method.most is not None and models > method.most):
        wanted = f"exactly {method.most}" if method.least == method.most else f"at least {method.least}"
        besides = "" if method.base != "needed" or "checkpoints" not in method.takes else " besides the base"
        raise RecipeError(f"{name} merges {wanted}{besides}, and {models} are given; choose another method")


def _refuse_unknown(
    name: str, method: MergeMethod, given: Mapping[str, object], options: CombineOptions
) -> None:
    known = [parameter.name for parameter in method.parameters if parameter.name != "weight"]
    if unknown := sorted(given.keys() - {*known}):
        hint = did_you_mean(unknown[0], known) if known else "it has none but the weights"
        raise RecipeError(f"{name} has no parameter {unknown[0]}; {hint}")
    if twice := [key for key in ("density",) if options.density is not None and key in (options.set or {})]:
        raise RecipeError(f"{twice[0]} is given twice, by --{twice[0]} and --set; give it once")
    if "int8_mask" in given:
        raise RecipeError("int8_mask changes nothing; leave it out")


def _weights(name: str, method: MergeMethod, options: CombineOptions, models: int) -> tuple[float, ...]:
    if options.weights is None:
        return (1.0,) * models
    if method.parameter("weight") is None:
        raise RecipeError(f"--weights changes nothing here: {name} has no weights; leave it out")
    if len(options.weights) != models:
        raise RecipeError(
            f"--weights has {len(options.weights)} numbers for {models} inputs; give one for each, in their "
            "order"
        )
    return options.weights
