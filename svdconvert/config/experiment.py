"""The sections of a recipe that only `run` uses, and its variants.

    variants:
      pissa: {decompose: {method: pissa}, train: {lr: 2.0e-4}}
      lora: {decompose: {method: lora}}
    seeds: [0, 1, 2]
    eval: {tasks: arithmetic, base: true}

Each variant is the recipe with the options under its name; with seeds, each is run once with every seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass as checked
from typing_extensions import Self

from svdconvert.checkpoint.file_names import name_fault, shared_name
from svdconvert.config.evaluation import EvaluationOptions
from svdconvert.config.options import Names
from svdconvert.errors import RecipeError, brief, did_you_mean

Step = Literal["decompose", "train", "merge", "to_lora", "eval", "report"]
STEPS: tuple[Step, ...] = ("decompose", "train", "merge", "to_lora", "eval", "report")
"""In the order in which `run` performs them."""
FOLDERS: Mapping[str, str] = {
    "decompose": "decomposed",
    "train": "trained",
    "merge": "merged",
    "to_lora": "lora",
}
"""Step -> the directory that it writes."""
BASE = "base"
"""The directory with the results of the untouched model."""
RECORD = "run.json"
RESULTS = "results.json"
REPORT = "report.html"
PICTURE = "curves.svg"
FILES = (RECORD, RESULTS, REPORT, PICTURE)
"""What `run` writes next to the directories."""
OWN_KEYS = ("variants", "seeds", "steps")
_MOST = 1000  # runs of one recipe

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@checked(frozen=True, kw_only=True, config=_STRICT)
class EvalSection(EvaluationOptions):
    """The `eval` section of a recipe: the options of `eval`, and who is asked."""

    tasks: Names
    """Tasks, or groups of tasks; see `svdconvert list tasks`."""
    of: Names | None = None
    """Who is asked: trained, merged, lora or decomposed; by default what was trained, else decomposed."""
    base: bool = False
    """Ask the untouched model too."""

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.regrade:
            raise ValueError("regrade is for svdconvert eval, after the run")
        return self


@checked(frozen=True, kw_only=True, config=_STRICT)
class ReportSection:
    """The `report` section of a recipe."""

    of: Names | None = None
    """The directories that the page shows, as for eval; by default those that were asked."""


@dataclass(frozen=True)
class Variant:
    """One run of a recipe."""

    name: str
    """The name of its directory; empty for the only run of a recipe without variants and seeds."""
    group: str
    """The name in `variants`: runs that differ only in their seed have the same."""
    seed: int | None
    """The seed out of `seeds`; None if the recipe has none."""
    shared: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]


def check_experiment(content: Mapping[str, Any], source: str) -> None:
    """Raise RecipeError if `variants`, `seeds` or `steps` cannot be used. Variants are checked one by one."""
    variants = content.get("variants")
    if variants is not None and not (isinstance(variants, dict) and variants):
        raise RecipeError(
            f"{source}: variants is not a mapping of names to options; write NAME: {{...}} lines"
        )
    for name in variants or ():
        if not names_a_directory(name):
            raise RecipeError(
                f"{source}: the variant {brief(name)} cannot name a directory next to the others; rename it"
            )
    seeds = content.get("seeds")
    if seeds is not None:
        _check_seeds(seeds, source)
    if len(variants or "1") * len(seeds or "1") > _MOST:
        raise RecipeError(f"{source} has more than {_MOST} runs; split it into several recipes")
    if content.get("steps") is not None:
        _check_steps(content["steps"], source)


def names_a_directory(name: Any) -> bool:
    """True for a variant's name that can be that of a directory next to what `run` writes itself."""
    is_plain = isinstance(name, str) and name_fault(name) is None and "/" not in name
    return is_plain and shared_name((BASE, *FILES, name)) is None


def _check_steps(steps: Any, source: str) -> None:
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise RecipeError(f"{source}: steps is {brief(steps)}: it should be a list of {', '.join(STEPS)}")
    if unknown := [step for step in steps if step.replace("-", "_") not in STEPS]:
        raise RecipeError(
            f"{source}: steps has the unknown {brief(unknown[0])}; {did_you_mean(unknown[0], STEPS)}"
        )


def changed_seeds(seeds: Sequence[int], changes: Mapping[str, Any], source: str) -> Sequence[int]:
    """The recipe's `seeds`, or those in `changes`. Raises RecipeError if they cannot be used."""
    if "seeds" in changes:
        _check_seeds(changes["seeds"], source)
        seeds = changes["seeds"]
    if seeds and "seed" in changes:
        raise RecipeError(
            f"{source}: seed changes nothing, because each run has one of the seeds "
            f"{', '.join(map(str, seeds))}; change seeds, such as seeds=[{changes['seed']}]"
        )
    return seeds


def _check_seeds(value: Any, source: str) -> None:
    """Raise RecipeError for what is no list of seeds."""
    are_seeds = (
        isinstance(value, list)
        and 0 < len(value) <= _MOST
        and all(type(seed) is int and 0 <= seed < 2**32 for seed in value)
        and len({*value}) == len(value)
    )
    if not are_seeds:
        raise RecipeError(f"{source}: seeds is {brief(value)}: it should be a list of different integers")


def changed(
    shared: Mapping[str, Any],
    sections: Mapping[str, Mapping[str, Any]],
    by: Mapping[str, Any],
    rivals: Mapping[str, set[str]],
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """(shared keys, sections) with the changes `by`: a section's options one by one.

    `rivals` are the options of each section of which only one can be given; a new one replaces the others.
    """
    new_shared = dict(shared)
    new_sections = dict(sections)
    for key, value in by.items():
        if not isinstance(value, Mapping):
            new_shared[key] = value
            continue
        excluded = rivals.get(key, set()) if value.keys() & rivals.get(key, set()) else set()
        old = {name: was for name, was in new_sections.get(key, {}).items() if name not in excluded}
        new_sections[key] = {**old, **value}
    return new_shared, new_sections


def with_seeds(variant: Variant, seeds: Sequence[int]) -> list[Variant]:
    """The variant once with every seed; itself if there are none."""
    if not seeds:
        return [variant]
    return [
        replace(
            variant,
            name="-".join(filter(None, (variant.group, f"seed{seed}"))),
            seed=seed,
            shared={**variant.shared, "seed": seed},
        )
        for seed in seeds
    ]
