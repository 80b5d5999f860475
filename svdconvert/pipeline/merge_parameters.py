"""The values of a merge method's parameters for one tensor: the innermost setting, else the default."""

from collections.abc import Iterable, Sequence

from svdconvert.config.mergekit_file import Condition, Scalar, Settings
from svdconvert.errors import RecipeError, brief, did_you_mean
from svdconvert.merging.base import MergeMethod, Parameter, Value


def resolve(
    parameter: Parameter, scopes: Iterable[Settings | None], tensor: str, position: float, place: str
) -> Value:
    """The value for a tensor.

    `scopes` go from the innermost to the outermost; `position` is that of the tensor's layer, from 0 to 1.
    Raises RecipeError if a required value is missing, or if one is of the wrong type or out of range.
    """
    for scope in scopes:
        for condition in (scope or {}).get(parameter.name, ()):
            if condition.filter is None or condition.filter in tensor:
                return parameter.check(_at(parameter, condition, position, place), place)
    if parameter.required:
        raise RecipeError(f"{place} gives no {parameter.name} for {tensor}; add it to the parameters")
    return parameter.default


def refuse_unknown(method: MergeMethod, scopes: Iterable[Settings | None], place: str) -> None:
    """Raise RecipeError for a parameter that the method does not have."""
    known = [parameter.name for parameter in method.parameters]
    for scope in scopes:
        if unknown := sorted(set(scope or {}) - set(known)):
            raise RecipeError(
                f"{place} has the parameter {brief(unknown[0])}, which the method does not; "
                f"{did_you_mean(unknown[0], known)}"
            )


def _at(parameter: Parameter, condition: Condition, position: float, place: str) -> Scalar:
    """A single value, or the value between those of a list at a position from 0 to 1."""
    values = condition.values
    if not isinstance(values, tuple):
        return _number(parameter, values)
    if isinstance(parameter.default, bool):
        return values[int(position * (len(values) - 1))]
    numbers = [float(parameter.check(_number(parameter, value), place)) for value in values]
    return between(numbers, position)


def between(numbers: Sequence[float], position: float) -> float:
    """Linear interpolation of numbers that are evenly spread over 0 to 1."""
    scaled = position * (len(numbers) - 1)
    first = int(scaled)
    second = min(len(numbers) - 1, first + 1)
    share = scaled - first
    return (1.0 - share) * numbers[first] + share * numbers[second]


def _number(parameter: Parameter, value: Scalar) -> Scalar:
    """YAML reads 1e-3 as a text."""
    if isinstance(value, str) and not isinstance(parameter.default, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value
