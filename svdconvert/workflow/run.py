"""svdconvert run: every step of a recipe, for every variant, up to the scores and the report."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from svdconvert.commands.report import report
from svdconvert.config.execution import Run
from svdconvert.config.experiment import PICTURE, REPORT, RESULTS
from svdconvert.config.recipe import read_recipe
from svdconvert.hub.download import fetch
from svdconvert.linalg.threads import use_threads
from svdconvert.reports.figures import require_matplotlib
from svdconvert.reports.learning import draw_learning
from svdconvert.training.run import Watch, ignore_log
from svdconvert.workflow.outcome import Outcome, curves_of, outcomes
from svdconvert.workflow.perform import continuing, evaluate_base, perform
from svdconvert.workflow.plan import Experiment, check_rows, plan_experiment
from svdconvert.workflow.record import begin, results_directory, write


def run(
    recipe: str | Path,
    out: str | Path,
    settings: Run | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    watch: Watch = ignore_log,
) -> list[Outcome]:
    """Perform all steps of a recipe below `out`, or continue where an earlier run was interrupted.

    `recipe` is a file or the name of a recipe of the package. Each variant gets a directory with decomposed,
    trained, merged and lora, as far as its steps write them, and the results of eval in these; next to them
    are results.json, curves.svg and report.html. `changes` replaces options of the recipe: {"model": ..,
    "train": {"steps": 2}}. `watch` is called with every measurement of the training. Raises SvdConvertError
    with one sentence.
    """
    settings = settings or Run()
    settings.ranks.alone("run")
    out = Path(out)
    read = read_recipe(Path(recipe))
    experiment = plan_experiment(read, changes or {}, out)
    for plan in experiment.plans:
        check_rows(plan)
    if experiment.reports:
        require_matplotlib()
    for model in {plan.model for plan in experiment.plans}:
        fetch(model, "sidecars")  # a model that does not exist is refused before anything is written
    begin(out, experiment.identity(), overwrite=settings.overwrite)
    use_threads(settings.threads)
    if experiment.asks_base:
        settings.notify("base: eval")
        evaluate_base(experiment.plans[0], results_directory(out), settings)
    _perform_all(experiment, continuing(settings), watch)
    found = outcomes(experiment, out)
    write(out / RESULTS, json.dumps([asdict(one) for one in found], indent=1) + "\n")
    if experiment.reports:
        _draw(experiment, found, out)
        settings.notify("report")
        shown = [plan.path(folder) for plan in experiment.plans for folder in plan.shown]
        report(shown, out / REPORT, Run(overwrite=True, threads=settings.threads))
    return found


def _perform_all(experiment: Experiment, settings: Run, watch: Watch) -> None:
    total = sum(len(plan.steps) for plan in experiment.plans)
    number = 0
    for plan in experiment.plans:
        for step in plan.steps:
            number += 1
            settings.notify(f"{plan.name}: {step.replace('_', '-')}, step {number} of {total}")
            perform(plan, step, settings, watch)


def _draw(experiment: Experiment, found: list[Outcome], out: Path) -> None:
    """Write the picture of all variants together: curves and scores."""
    curves = [(plan.variant.group or plan.name, curves_of(plan)) for plan in experiment.plans]
    scores = [
        (f"{one.run} {score.of}" if len({s.of for s in one.scores}) > 1 else one.run, one.variant, score)
        for one in found
        for score in one.scores
    ]
    bars = [(label, group, score.task, score.score, score.interval) for label, group, score in scores]
    write(out / PICTURE, draw_learning(curves, bars))
