"""mergekit's YAML: which models are merged, by which method, with which parameters for which tensors.

Source: mergekit 0.1.5, `mergekit/config.py` and the examples in its README. What is not supported is refused
by name, so that no key of a file is ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdconvert.config.yaml_file import read_yaml
from svdconvert.errors import RecipeError, brief, did_you_mean

Scalar = bool | int | float | str
_MOST_ENTRIES = 10_000  # of a list of models, slices or values
_MOST_IN_ALL = 200_000
_MOST_LAYERS = 100_000
_KEYS = (
    "base_model", "chat_template", "dtype", "merge_method", "models", "out_dtype", "parameters", "slices",
    "tokenizer_source",
)  # fmt: skip
_DTYPES = ("float32", "bfloat16", "float16")
_ELSEWHERE = {
    "modules": "models with several modules are not merged in parts",
    "tokenizer": "only the base's tokenizer is kept: use tokenizer_source: base",
}


@dataclass(frozen=True)
class Condition:
    """A value, or values from the first layer to the last, for tensors whose names contain a text."""

    values: Scalar | tuple[Scalar, ...]
    filter: str | None = None


Setting = tuple[Condition, ...]
"""The first condition that applies decides."""
Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class SliceSource:
    """Layers of one model."""

    model: str
    layers: tuple[int, int] | None = None
    """From the first to before the second; None for all."""
    parameters: Settings | None = None


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result, and the layers that they are merged from."""

    sources: tuple[SliceSource, ...]
    base: str | None = None
    parameters: Settings | None = None


@dataclass(frozen=True)
class MergeFile:
    """What a file in mergekit's format says."""

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: Settings | None = None
    dtype: str | None = None
    """Element type of the result."""


def read_merge_file(path: Path) -> MergeFile:
    """Read and check a file. Raises RecipeError for a key or value that is unknown or not supported."""
    return _Reader(str(path)).file(read_yaml(path, "--config"))


class _Reader:
    """Checks values; `place` is the file and the key for messages."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._read = 0

    def _count(self, entries: int) -> None:
        """Count what was read: with YAML's aliases, a short file can repeat a list without end."""
        self._read += entries
        if self._read > _MOST_IN_ALL:
            raise RecipeError(f"{self._place} has more than {_MOST_IN_ALL} entries; give a shorter file")

    def file(self, content: object) -> MergeFile:
        """The whole file."""
        values = self._mapping(content, "the file", _KEYS)
        method = self._text(values.get("merge_method"), "merge_method").replace("_", "-")
        if (values.get("models") is None) == (values.get("slices") is None):
            raise RecipeError(f"{self._place}: give either models or slices")
        base = values.get("base_model")
        self._refuse_foreign(values)
        if values.get("models") is not None:
            models = self._list(values["models"], "models")
            slices: tuple[Slice, ...] = (
                Slice(tuple(self._source(one, ("model", "parameters")) for one in models)),
            )
        else:
            slices = tuple(self._slice(one) for one in self._list(values["slices"], "slices"))
        return MergeFile(
            method=method,
            slices=slices,
            base=None if base is None else self._model(base, "base_model"),
            parameters=self._settings(values.get("parameters")),
            dtype=self._dtype(values.get("out_dtype") or values.get("dtype")),
        )

    def _refuse_foreign(self, values: Mapping[str, Any]) -> None:
        """Raise RecipeError for a tokenizer or a template that is not the base's."""
        for key in ("tokenizer_source", "chat_template"):
            if values.get(key) not in (None, "base"):
                raise RecipeError(
                    f"{self._place}: {key} is {brief(values[key])}, and only that of the base is kept; write "
                    "base, or leave the key out"
                )

    def _slice(self, content: object) -> Slice:
        values = self._mapping(content, "a slice", ("sources", "base_model", "parameters"))
        known = ("model", "layer_range", "parameters")
        sources = tuple(self._source(one, known) for one in self._list(values.get("sources"), "sources"))
        if absent := [source.model for source in sources if source.layers is None]:
            raise RecipeError(f"{self._place}: the slice of {brief(absent[0])} has no layer_range")
        counts = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(counts) > 1:
            raise RecipeError(f"{self._place}: the sources of a slice have different numbers of layers")
        base = values.get("base_model")
        return Slice(
            sources,
            None if base is None else self._model(base, "base_model"),
            self._settings(values.get("parameters")),
        )

    def _source(self, content: object, known: Sequence[str]) -> SliceSource:
        values = self._mapping(content, "a model", known)
        layers = values.get("layer_range")
        return SliceSource(
            self._model(values.get("model"), "model"),
            None if layers is None else self._range(layers),
            self._settings(values.get("parameters")),
        )

    def _model(self, value: object, key: str) -> str:
        """path[@revision], which mergekit also writes as {model: {path, revision}}."""
        if not isinstance(value, dict):
            return self._text(value, key)
        given = {name: part for name, part in value.items() if part is not None}
        inner = self._mapping(given, key, ("model",)).get("model")
        values = self._mapping(inner, f"the model of {key}", ("path", "revision"))
        path = self._text(values.get("path"), "path")
        revision = values.get("revision")
        return path if revision is None else f"{path}@{self._text(revision, 'revision')}"

    def _range(self, value: object) -> tuple[int, int]:
        numbers = self._list(value, "layer_range")
        if len(numbers) != 2 or not all(type(one) is int and 0 <= one <= _MOST_LAYERS for one in numbers):
            raise RecipeError(f"{self._place}: layer_range is {brief(value)}, which must be two numbers")
        if numbers[0] >= numbers[1]:
            raise RecipeError(f"{self._place}: layer_range is {brief(value)}, which holds no layer")
        return numbers[0], numbers[1]

    def _settings(self, content: object) -> Settings | None:
        if content is None:
            return None
        if not isinstance(content, dict):
            raise RecipeError(f"{self._place}: parameters is {brief(content)}, which must be a mapping")
        return {
            self._text(name, "a parameter"): self._setting(str(name), value)
            for name, value in content.items()
        }

    def _setting(self, name: str, value: object) -> Setting:
        """One value, values from layer to layer, or a list of conditions."""
        parts = value if isinstance(value, list) else [value]
        if len(parts) > _MOST_ENTRIES:
            raise RecipeError(f"{self._place}: {name} has more than {_MOST_ENTRIES} values")
        if not any(isinstance(part, dict) for part in parts):
            return (Condition(self._values(name, value)),)
        return tuple(self._condition(name, part) for part in parts)

    def _condition(self, name: str, content: object) -> Condition:
        values = self._mapping(content, name, ("value", "filter"))
        if "value" not in values:
            raise RecipeError(f"{self._place}: a condition of {name} has no value")
        pattern = values.get("filter")
        return Condition(
            self._values(name, values["value"]),
            None if pattern in (None, "*") else self._text(pattern, "filter"),
        )

    def _values(self, name: str, value: object) -> Scalar | tuple[Scalar, ...]:
        parts = value if isinstance(value, list) else [value]
        if not parts or len(parts) > _MOST_ENTRIES or not all(isinstance(one, Scalar) for one in parts):
            raise RecipeError(
                f"{self._place}: {name} is {brief(value)}, which must be a number, a list of numbers, or "
                "conditions with value and filter"
            )
        self._count(len(parts))
        values = tuple(one for one in parts if isinstance(one, Scalar))
        return values if isinstance(value, list) else values[0]

    def _dtype(self, value: object) -> str | None:
        if value is not None and value not in _DTYPES:
            raise RecipeError(f"{self._place}: dtype is {brief(value)}; use one of {', '.join(_DTYPES)}")
        return None if value is None else str(value)

    def _text(self, value: object, key: str) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= 4096:
            raise RecipeError(f"{self._place}: {key} is {brief(value)}, which must be a text")
        return value

    def _list(self, value: object, key: str) -> list[Any]:
        if not isinstance(value, list) or not 0 < len(value) <= _MOST_ENTRIES:
            raise RecipeError(f"{self._place}: {key} is {brief(value)}, which must be a list")
        self._count(len(value))
        return value

    def _mapping(self, value: object, what: str, known: Sequence[str]) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise RecipeError(f"{self._place}: {what} is {brief(value)}, which must be a mapping of keys")
        for key in value:
            if key in _ELSEWHERE:
                raise RecipeError(f"{self._place}: {key} is not supported: {_ELSEWHERE[key]}")
            if key not in known:
                hint = did_you_mean(str(key), known)
                raise RecipeError(
                    f"{self._place}: {what} has the key {brief(key)}, which is not supported; {hint}"
                )
        return value
