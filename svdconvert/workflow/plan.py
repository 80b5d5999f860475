"""What `run` will do for every variant of a recipe: its steps, their options and their directories."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdconvert.config.experiment import FOLDERS, STEPS, EvalSection, ReportSection, Step, Variant
from svdconvert.config.options import LoraOptions, MergeOptions, SplitOptions
from svdconvert.config.recipe import Recipe, is_shared, options, variants_of
from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError, MissingOptionError, RecipeError, SandboxError, brief, did_you_mean
from svdconvert.evaluation.base import tasks_named
from svdconvert.evaluation.choices import check_choices
from svdconvert.methods.base import METHODS
from svdconvert.pipeline.effects import without_idle_seed
from svdconvert.training.data.dataset import require_data
from svdconvert.training.data.rows import require_rows

_OPTIONS: Mapping[str, type] = {"train": TrainOptions, "merge": MergeOptions, "to_lora": LoraOptions}
_OF_ADAPTERS = ("decompose", "merge", "to_lora")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The run of one variant."""

    variant: Variant
    recipe: Recipe
    """The variant's own."""
    model: str
    directory: Path
    """The steps write into directories below it."""
    steps: Sequence[Step]
    """The steps of this variant, in order; without the report, which is about all variants."""
    split: SplitOptions
    options: Mapping[str, Any]
    """Step -> its options."""
    asked: Sequence[str]
    """The directories that are evaluated, such as trained."""
    shown: Sequence[str]
    """The directories in the report."""

    @property
    def name(self) -> str:
        """The name of the variant, or that of the recipe if it has only one."""
        return self.variant.name or (self.recipe.path.stem if self.recipe.path else "")

    def path(self, folder: str) -> Path:
        """The directory of a step's output, by its name."""
        return self.directory / folder

    @property
    def evaluation(self) -> EvalSection | None:
        """The options of eval; None without that step."""
        return self.options.get("eval")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A recipe with everything that it asks for."""

    plans: Sequence[Plan]
    reports: bool
    """True if a report is written in the end."""

    @property
    def asks_base(self) -> bool:
        """True if the untouched model is evaluated too."""
        return any(plan.evaluation is not None and plan.evaluation.base for plan in self.plans)

    def identity(self) -> dict[str, Any]:
        """Everything that shapes the results: an interrupted run continues only if it is the same."""
        found = {
            plan.variant.name: {
                "steps": [*plan.steps, *(["report"] if self.reports else [])],
                **plan.variant.shared,
                **{key: dict(value) for key, value in plan.variant.sections.items() if value},
            }
            for plan in self.plans
        }
        return {"recipe": found[""]} if "" in found else {"runs": found}


def plan_experiment(recipe: Recipe, changes: Mapping[str, Any], out: Path) -> Experiment:
    """Plan all steps, and check their options. Raises SvdConvertError before anything is written."""
    plans = [_plan(variant, single, out) for variant, single in variants_of(recipe, changes)]
    experiment = Experiment(plans=plans, reports="report" in _wanted(recipe, plans[0].variant))
    if experiment.asks_base and len({plan.model for plan in plans}) > 1:
        raise RecipeError(f"{recipe.path}: eval: base asks one model, and the variants have several")
    return experiment


def _wanted(recipe: Recipe, variant: Variant) -> list[Step]:
    """The steps that the recipe names, or those of the sections that it or the variant has."""
    if recipe.steps is not None:
        return [step for step in STEPS if step in recipe.steps]
    return [step for step in STEPS if step in recipe.present or variant.sections.get(step)]


def _evaluation(recipe: Recipe) -> EvalSection:
    try:
        return options(EvalSection, recipe, {})
    except MissingOptionError as error:
        raise RecipeError(f"{recipe.path}: {error}; add it") from error


def _plan(variant: Variant, recipe: Recipe, out: Path) -> Plan:
    model = recipe.get("model")
    if not model:
        raise RecipeError(f"{recipe.path} names no model; give one with --model")
    split: SplitOptions = options(SplitOptions, recipe, {})
    if is_shared("seed", "decompose", recipe):
        split = without_idle_seed(split)
    steps = [step for step in _wanted(recipe, variant) if step != "report"]
    if METHODS.get(split.method).split is None:
        steps = [step for step in steps if step not in _OF_ADAPTERS]
    if not {"decompose", "train"} & {*steps}:
        raise RecipeError(f"{recipe.path} has neither decompose nor train, so there is nothing to run")
    chosen: dict[str, Any] = {
        step: options(kind, recipe, {}) for step, kind in _OPTIONS.items() if step in steps
    }
    if "eval" in steps:
        chosen["eval"] = _evaluation(recipe)
        tasks_named(chosen["eval"].tasks)
    report = options(ReportSection, recipe, {})
    asked = _directories(chosen["eval"].of, "eval", steps, recipe) if "eval" in steps else []
    return Plan(
        variant=variant,
        recipe=recipe,
        model=str(model),
        directory=out / variant.name,
        steps=steps,
        split=split,
        options=chosen,
        asked=asked,
        shown=_directories(report.of, "report", steps, recipe) if report.of or not asked else asked,
    )


def _directories(
    of: Sequence[str] | None, section: str, steps: Sequence[str], recipe: Recipe
) -> Sequence[str]:
    """The directories named in `of`, or the default. Raises RecipeError for one that no step writes."""
    written = [FOLDERS[step] for step in steps if step in FOLDERS]
    if of is None:
        return ["trained" if "trained" in written else "decomposed"]
    if unknown := [name for name in of if name not in FOLDERS.values()]:
        raise RecipeError(
            f"{recipe.path}: {section}: of has the unknown {brief(unknown[0])}; "
            f"{did_you_mean(unknown[0], FOLDERS.values())}"
        )
    if "decompose" not in steps and written == ["trained"]:
        return ["trained"]  # every weight was trained, so this is all that there is
    if absent := [name for name in of if name not in written]:
        raise RecipeError(f"{recipe.path}: {section}: of names {absent[0]}, which none of its steps writes")
    return list(of)


def check_rows(plan: Plan) -> None:
    """Raise RecipeError for rows and tasks that a later step would refuse, before the first one begins."""
    try:
        if "train" in plan.options:
            require_data(plan.options["train"])
        if plan.evaluation is not None:
            check_choices(tasks_named(plan.evaluation.tasks), plan.evaluation)
            if plan.evaluation.data is not None:
                require_rows(plan.evaluation.data)
    except (DataError, RecipeError, SandboxError) as error:
        raise RecipeError(f"{plan.recipe.path}: {error}") from error
