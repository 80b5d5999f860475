"""Recipes: the options of all steps in one YAML file, and how they combine with the command line.

    model: org/name
    seed: 1
    decompose: {method: pissa, rank: 16}
    train: {data: train.jsonl, steps: 100}

The command line wins over the recipe. An unknown key is an error that lists the known ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from svdconvert.config.combine import CombineOptions
from svdconvert.config.options import (
    RANK_RULES,
    ConvertOptions,
    ExtractOptions,
    LoraOptions,
    MergeOptions,
    SplitOptions,
)
from svdconvert.config.train import REPEATED, TrainOptions
from svdconvert.config.yaml_file import read_yaml
from svdconvert.errors import RecipeError, brief, did_you_mean

T = TypeVar("T")

SECTIONS: Mapping[str, type] = {
    "decompose": SplitOptions,
    "train": TrainOptions,
    "merge": MergeOptions,
    "to_lora": LoraOptions,
    "convert": ConvertOptions,
    "combine": CombineOptions,
    "extract": ExtractOptions,
}
COMMAND_OF_KIND: Mapping[str, str] = {
    "decomposed": "decompose",
    "trained": "train",
    "finetuned": "train",
    "merged": "merge",
    "lora": "to_lora",
    "converted": "convert",
}
"""Kind of a directory -> the section of the command that wrote it."""


def section_of(kind: str, command: str | None) -> str:
    """The section with the options of the command that wrote a directory; `command` is in its manifest."""
    return command if command is not None and command in SECTIONS else COMMAND_OF_KIND[kind]


SHARED: Mapping[str, type] = {"model": str, "seed": int, "threads": int, "device": str}
_SPELLINGS = {"from": "side"}  # a reserved word in Python
# Options of which only one can be given: if one is typed, those of the recipe are ignored.
_EXCLUSIVE = {
    "train": {"steps", "epochs"},
    "to_lora": {"rank", "tol", "rank_budget"},
    "combine": {"rank", "tol", "rank_budget"},
    "extract": {*RANK_RULES},
}


@dataclass(frozen=True)
class Recipe:
    """A recipe: keys that all commands share, and the options of each command."""

    shared: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    path: Path | None = None

    def get(self, key: str) -> Any:
        """The value of a shared key; None if the recipe does not have it."""
        return self.shared.get(key)


def read_recipe(path: Path | None) -> Recipe:
    """Read a recipe and check its keys. Raises RecipeError for an unknown key or a file that is not YAML."""
    if path is None:
        return Recipe()
    content = read_yaml(path, "--recipe") or {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path} is not a mapping of keys; write some of {', '.join([*SHARED, *SECTIONS])}")
    content = _plain(content)
    _refuse_unknown(content, [*SHARED, *SECTIONS], str(path))
    _check_shared(content, path)
    sections = {}
    for name, kind in SECTIONS.items():
        section = content.pop(name, None) or {}
        if not isinstance(section, dict):
            raise RecipeError(
                f"{path}: {name} is not a mapping of options; write OPTION: VALUE lines below it"
            )
        sections[name] = _plain(section)
        _refuse_unknown(sections[name], [entry.name for entry in fields(kind)], f"{path}: {name}")
    return Recipe(content, sections, path)


def _check_shared(content: Mapping[str, Any], path: Path) -> None:
    """Raise RecipeError for a key of all commands with a value of the wrong type."""
    for key, kind in SHARED.items():
        value = content.get(key)
        is_right = isinstance(value, kind) and not isinstance(value, bool)
        if value is not None and not (is_right and (key != "threads" or value > 0)):
            expected = "a text" if kind is str else "an integer" if key == "seed" else "an integer above zero"
            raise RecipeError(f"{path}: {key} is {brief(value)}: it should be {expected}")


def options(kind: type[T], recipe: Recipe, typed: Mapping[str, Any]) -> T:
    """The options of one command: what was typed, else the recipe's, else the defaults.

    Raises RecipeError for a value that is out of range or of the wrong type.
    """
    section = next(name for name, known in SECTIONS.items() if known is kind)
    known = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    shared = {key: value for key, value in recipe.shared.items() if key in known}
    given = {key: value for key, value in typed.items() if value is not None}
    written = {**shared, **recipe.sections.get(section, {})}
    if given.keys() & (rivals := _EXCLUSIVE.get(section, set())):
        written = {key: value for key, value in written.items() if key not in rivals}
    values = {**written, **given}
    draws = section not in ("merge", "combine") or values.get("rounding") == "stochastic"
    if not draws and is_shared("seed", section, recipe, given):
        values.pop("seed", None)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        command = section.replace("_", "-")
        source = command if recipe.path is None or key in given else f"{recipe.path}: {section}"
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should", 1)
        wrong = f"{key} is {brief(first['input'])}: {message}" if key else message
        # Not `from error`: its text repeats the value, and with YAML's aliases a short file holds a huge one.
        raise RecipeError(f"{source}: {wrong}") from None


def is_shared(key: str, section: str, recipe: Recipe, typed: Mapping[str, Any] | None = None) -> bool:
    """True if `key` can only come from what a recipe says for all commands, some of which may not use it."""
    return key not in (typed or {}) and key not in recipe.sections.get(section, {})


def non_default_options(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options among `values` that differ from their defaults."""
    usual = {entry.name: entry.default for entry in fields(SECTIONS[section])}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    return {name: value for name, value in values.items() if plain.get(name) != value}


def to_cli_args(section: str, values: Mapping[str, Any]) -> list[str]:
    """The arguments of a command line for the options that differ from their defaults."""
    known = {entry.name for entry in fields(SECTIONS[section])}
    spellings = {name: spelling for spelling, name in _SPELLINGS.items()}
    words: list[str] = []
    for name, value in non_default_options(section, values).items():
        option = f"--{spellings.get(name, name).replace('_', '-')}"
        if name not in known or value is None:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, Mapping):
            words += [option, ",".join(f"{key}={inner}" for key, inner in value.items())]
        elif isinstance(value, (list, tuple)) and name in REPEATED:
            words += [word for one in value for word in (option, str(one))]
        elif isinstance(value, (list, tuple)):
            words += [option, ",".join(map(str, value))]
        else:
            words += [option, str(value)]
    return words


def _plain(values: Mapping[Any, Any]) -> dict[str, Any]:
    names = {str(key).replace("-", "_"): value for key, value in values.items()}
    return {_SPELLINGS.get(key, key): value for key, value in names.items()}


def _refuse_unknown(values: Mapping[str, Any], known: list[str], source: str) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise RecipeError(
            f"{source} has the unknown key {brief(unknown[0])}; {did_you_mean(unknown[0], known)}"
        )
