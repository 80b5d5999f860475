"""Recipes: the options of all steps in one YAML file, and how they combine with the command line.

    model: org/name
    seed: 1
    decompose: {method: pissa, rank: 16}
    train: {data: train.jsonl, steps: 100}

The command line wins over the recipe. An unknown key is an error that lists the known ones. A data file is
looked for next to the recipe first. `run` performs all steps, and all variants; see `config/experiment.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from svdconvert.checkpoint.file_names import shared_name
from svdconvert.config.combine import CombineOptions
from svdconvert.config.experiment import (
    OWN_KEYS,
    EvalSection,
    ReportSection,
    Variant,
    changed,
    changed_seeds,
    check_experiment,
    with_seeds,
)
from svdconvert.config.options import (
    RANK_RULES,
    ConvertOptions,
    ExtractOptions,
    LoraOptions,
    MergeOptions,
    SplitOptions,
)
from svdconvert.config.recipe_files import find_recipe, with_neighbours
from svdconvert.config.train import REPEATED, TrainOptions
from svdconvert.config.yaml_file import read_yaml
from svdconvert.errors import MissingOptionError, RecipeError, brief, did_you_mean

T = TypeVar("T")

SECTIONS: Mapping[str, type] = {
    "decompose": SplitOptions,
    "train": TrainOptions,
    "merge": MergeOptions,
    "to_lora": LoraOptions,
    "convert": ConvertOptions,
    "combine": CombineOptions,
    "extract": ExtractOptions,
    "eval": EvalSection,
    "report": ReportSection,
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
    present: frozenset[str] = frozenset()
    """The sections that the file has, empty ones too: the steps of `run`."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> what differs in this variant, as `changes` of `variants_of`."""
    seeds: Sequence[int] = ()
    steps: Sequence[str] | None = None
    """The steps of `run`, if they are not those of the sections."""

    def get(self, key: str) -> Any:
        """The value of a shared key; None if the recipe does not have it."""
        return self.shared.get(key)


def read_recipe(path: Path | None) -> Recipe:
    """Read a recipe, a file or one of the package by its name, and check its keys.

    Raises RecipeError for an unknown key or a file that is not YAML.
    """
    if path is None:
        return Recipe()
    path = find_recipe(path)
    content = _plain(_read_mapping(path))
    _refuse_unknown(content, [*SHARED, *OWN_KEYS, *SECTIONS], str(path))
    check_experiment(content, str(path))
    own = {key: content.pop(key, None) for key in OWN_KEYS}
    present = frozenset(content.keys() & SECTIONS.keys())
    shared, sections = _parse(content, str(path), path.parent)
    variants: dict[str, Mapping[str, Any]] = {}
    for name, changes in (own["variants"] or {}).items():
        variants[name] = _changes(changes or {}, f"{path}: variants: {name}", path.parent)
    _refuse_consent([sections, *variants.values()], path)
    steps = own["steps"] and [step.replace("-", "_") for step in own["steps"]]
    return Recipe(shared, sections, path, present, variants, own["seeds"] or (), steps)


def _read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises RecipeError if there is none."""
    content = read_yaml(path, "--recipe") or {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path} is not a mapping of keys; write some of {', '.join([*SHARED, *SECTIONS])}")
    return content


def _parse(
    content: Mapping[str, Any], source: str, folder: Path
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """(shared keys, options by section) of a mapping with known keys. Raises RecipeError."""
    shared = {key: value for key, value in content.items() if key in SHARED}
    _check_shared(shared, source)
    sections: dict[str, Mapping[str, Any]] = {}
    for name, kind in SECTIONS.items():
        section = content.get(name) or {}
        if not isinstance(section, dict):
            raise RecipeError(
                f"{source}: {name} is not a mapping of options; write OPTION: VALUE lines below it"
            )
        options = _plain(section)
        _refuse_unknown(options, [entry.name for entry in fields(kind)], f"{source}: {name}")
        sections[name] = with_neighbours(name, options, folder)
    return shared, sections


def _refuse_consent(parts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Raise RecipeError if a recipe, which may come from anybody, allows to run what a model wrote."""
    if any("run_code" in (part.get("eval") or {}) for part in parts):
        raise RecipeError(
            f"{path}: eval: run_code is not read from a recipe, because it runs what a model wrote; type "
            "svdconvert run with --run-code"
        )


def _changes(content: Any, source: str, folder: Path) -> dict[str, Any]:
    """What a variant changes: shared keys, and options by section. Raises RecipeError."""
    if not isinstance(content, dict):
        raise RecipeError(f"{source} is not a mapping of options; write SECTION: {{OPTION: VALUE}} lines")
    plain = _plain(content)
    _refuse_unknown(plain, [*SHARED, *SECTIONS], source)
    shared, sections = _parse(plain, source, folder)
    return {**shared, **{name: options for name, options in sections.items() if options}}


def variants_of(recipe: Recipe, changes: Mapping[str, Any]) -> list[tuple[Variant, Recipe]]:
    """Every run of a recipe with its own recipe, after `changes`: {"seeds": [0], "train": {"steps": 2}}.

    Raises RecipeError for an unknown key in `changes`, or for two runs with the same name.
    """
    source = f"{recipe.path}, as changed"
    if fixed := next((name for name in OWN_KEYS if name in changes and name != "seeds"), None):
        raise RecipeError(
            f"{fixed} decides what runs {recipe.path} has, and --set does not change that; edit a copy of it"
        )
    seeds = changed_seeds(recipe.seeds, changes, source)
    typed = _changes({key: value for key, value in changes.items() if key != "seeds"}, source, Path())
    found: list[tuple[Variant, Recipe]] = []
    for name, own in (recipe.variants or {"": {}}).items():
        shared, sections = changed(recipe.shared, recipe.sections, own, _EXCLUSIVE)
        shared, sections = changed(shared, sections, typed, _EXCLUSIVE)
        plain = Variant(name, name, None, shared, sections)
        for variant in with_seeds(plain, seeds):
            single = replace(recipe, shared=variant.shared, sections=variant.sections, variants={}, seeds=())
            found.append((variant, single))
    if twice := shared_name(variant.name for variant, _ in found):
        is_one = twice[0] == twice[1]
        names = twice[0] if is_one else f"{twice[0]} and {twice[1]}, one directory on some disks"
        raise RecipeError(f"{recipe.path} has two runs that are called {names}; rename a variant")
    return found


def _check_shared(content: Mapping[str, Any], source: str) -> None:
    """Raise RecipeError for a key of all commands with a value of the wrong type."""
    for key, kind in SHARED.items():
        value = content.get(key)
        is_right = isinstance(value, kind) and not isinstance(value, bool)
        if value is not None and not (is_right and (key != "threads" or value > 0)):
            expected = "a text" if kind is str else "an integer" if key == "seed" else "an integer above zero"
            raise RecipeError(f"{source}: {key} is {brief(value)}: it should be {expected}")


def options(kind: type[T], recipe: Recipe, typed: Mapping[str, Any]) -> T:
    """The options of one command: what was typed, else the recipe's, else the defaults.

    Raises RecipeError for a value that is out of range or of the wrong type, and for a recipe with variants.
    """
    if recipe.variants or recipe.seeds:
        raise RecipeError(
            f"{recipe.path} has several variants or seeds, which only run performs; type svdconvert run "
            f"{recipe.path} -o DIR, or write a recipe of one of them"
        )
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
        if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            raise MissingOptionError(f"{command}: `{key}` is missing") from None
        source = command if recipe.path is None or key in given else f"{recipe.path}: {section}"
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should", 1)
        named = f"`{key}`" if source == command else key
        wrong = f"{named} is {brief(first['input'])}: {message}" if key else message
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
