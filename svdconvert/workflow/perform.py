"""The steps of `run`: each calls one command, unless its directory is there, made with the same options."""

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path

from svdconvert.commands.decompose import decompose
from svdconvert.commands.evaluate import evaluate
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.commands.train import train
from svdconvert.config.evaluation import EvaluationOptions
from svdconvert.config.execution import Run, ignore_message
from svdconvert.config.experiment import FOLDERS, EvalSection, Step
from svdconvert.errors import OutputError
from svdconvert.evaluation.base import Task, tasks_named
from svdconvert.manifest.evaluations import FOLDER, manifest_fingerprint, read_evaluation, result_name
from svdconvert.manifest.schema import has_manifest, read_manifest
from svdconvert.training.run import Watch
from svdconvert.workflow.plan import Plan


def perform(plan: Plan, step: Step, run: Run, watch: Watch) -> None:
    """Perform one step of a variant, or continue it, unless it is done. Raises SvdConvertError."""
    if step == "eval":
        _evaluate(plan, run)
    elif not _is_done(plan, step):
        _COMMANDS[step](plan, plan.path(FOLDERS[step]), run, watch)
    gc.collect()  # a network holds references to itself, and the next step loads another one


def _decompose(plan: Plan, out: Path, run: Run, watch: Watch) -> None:
    decompose(plan.model, out, plan.split, run)


def _train(plan: Plan, out: Path, run: Run, watch: Watch) -> None:
    if "decompose" in plan.steps:
        train(plan.path("decomposed"), out, plan.options["train"], run, watch=watch)
    else:
        train(plan.model, out, plan.options["train"], run, split=plan.split, watch=watch)


def _merge(plan: Plan, out: Path, run: Run, watch: Watch) -> None:
    merge(_adapter(plan), out, plan.options["merge"], run)


def _to_lora(plan: Plan, out: Path, run: Run, watch: Watch) -> None:
    to_lora(_adapter(plan), out, plan.options["to_lora"], run)


_COMMANDS: Mapping[str, Callable[[Plan, Path, Run, Watch], None]] = {
    "decompose": _decompose,
    "train": _train,
    "merge": _merge,
    "to_lora": _to_lora,
}


def _adapter(plan: Plan) -> Path:
    """What is merged or converted: the trained adapter, or the initial one if nothing is trained."""
    return plan.path("trained" if "train" in plan.steps else "decomposed")


def _is_done(plan: Plan, step: Step) -> bool:
    """True if the step's directory is complete.

    Raises OutputError if it was made with other options than the recipe's.
    """
    directory = plan.path(FOLDERS[step])
    if not has_manifest(directory):
        return False
    made = read_manifest(directory).options
    wanted = json.loads(json.dumps(asdict(plan.split if step == "decompose" else plan.options[step])))
    for name in plan.variant.sections.get(step, {}):
        if name in made and wanted[name] != made[name]:
            raise OutputError(
                f"{directory} was made with {name} {made[name]!r}, and the recipe says {wanted[name]!r}; "
                "give --overwrite to start again, or choose another -o"
            )
    return True


def _evaluate(plan: Plan, run: Run) -> None:
    section = plan.evaluation
    assert section is not None
    for folder in plan.asked:
        directory = plan.path(folder)
        for task in tasks_named(section.tasks):
            if not _is_answered(directory, task, section):
                evaluate(directory, [task.name], _options_of(section, task), run)


def evaluate_base(plan: Plan, out: Path, run: Run) -> None:
    """Ask the untouched model, with the results in `out`, unless they are there and are this model's."""
    assert plan.evaluation is not None
    for task in tasks_named(plan.evaluation.tasks):
        is_there = (out / FOLDER / f"{result_name(task.name)}.json").is_file()
        quiet = replace(run, notify=ignore_message) if is_there and not run.overwrite else run
        evaluate(plan.model, [task.name], _options_of(plan.evaluation, task), quiet, output=out)
    gc.collect()


def _options_of(section: EvalSection, task: Task) -> EvaluationOptions:
    """The options of eval for one task, of which only some run code."""
    names = [entry.name for entry in fields(EvaluationOptions)]
    of_code = () if task.runs_code else ("run_code", "sandbox")
    return EvaluationOptions(**{name: getattr(section, name) for name in names if name not in of_code})


def _is_answered(directory: Path, task: Task, section: EvalSection) -> bool:
    """True if there is a result of this task, of the directory as it is, and with the recipe's limit."""
    path = directory / FOLDER / f"{result_name(task.name)}.json"
    if not path.is_file():
        return False
    found = read_evaluation(path)
    return (
        found.version == task.version
        and found.data.limit == section.limit
        and found.model.fingerprint == manifest_fingerprint(read_manifest(directory))
    )


def continuing(run: Run) -> Run:
    """The settings of a single step: what may be overwritten was removed before the first one."""
    return replace(run, overwrite=False)
