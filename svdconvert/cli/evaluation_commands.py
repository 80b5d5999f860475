"""The command eval: scores of models on tasks, and the comparison of several results."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdconvert.cli import progress, summaries
from svdconvert.cli.answers import tell
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    BaseOpt,
    DebugOpt,
    DeviceOpt,
    JsonOpt,
    ResidualOpt,
    ThreadsOpt,
    TrustOpt,
    option,
    required,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.help import examples
from svdconvert.cli.option_groups import EVALUATION, SAVING
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.terminal import leads
from svdconvert.cli.wording import spelled
from svdconvert.config.evaluation import EvaluationOptions, evaluation_options
from svdconvert.config.recipe import Recipe

if TYPE_CHECKING:
    from svdconvert.manifest.evaluations import EvaluationResult

_COLUMNS = ("task", "graded", "n", "right", "score in %", "95 % interval", "unanswered", "cut")


@app.command(
    cls=SingleOptions,
    name="eval",
    epilog=examples(
        "svdconvert eval trained --tasks gsm8k,math --limit 200",
        "svdconvert eval org/name --tasks humaneval --run-code -o results",
        "svdconvert eval base trained-pissa trained-lora --compare",
    ),
)
@with_options(EvaluationOptions, panel=EVALUATION)
def evaluate(
    typed: Typed,
    directories: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR|MODEL...",
            help="Any directory, an adapter, or org/name[@revision]; with --compare several directories.",
        ),
    ],
    tasks: Annotated[
        str | None,
        option("--tasks", "TASK,...", "Tasks, or groups of tasks; see svdconvert list tasks.", EVALUATION),
    ] = None,
    compare: Annotated[
        bool,
        option("--compare", None, "Compare the results of several directories, row by row.", EVALUATION),
    ] = False,
    out: Annotated[
        Path | None, option("-o, --out", "DIR", "Where evaluations/ is written, if not into DIR.", SAVING)
    ] = None,
    base: BaseOpt = None,
    residual: ResidualOpt = None,
    overwrite: Annotated[
        bool, option("--overwrite", None, "Ask the model again, and replace the results.", SAVING)
    ] = False,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Let a model answer the tasks of the papers, and grade the answers; a killed run is continued."""
    with report_errors(debug=debug, json=json):
        names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else []
        if compare:
            given = {"out": out, "base": base, "residual": residual, "threads": threads, "device": device}
            flags = {"overwrite": overwrite or None, "trust_remote_code": trust_remote_code or None}
            _compare(directories, names, {**typed, **given, **flags})
            return
        from svdconvert.commands.evaluate import evaluate as command

        if len(directories) > 1:
            raise typer.BadParameter("several directories are for --compare; give one, or add --compare")
        names = required(names or None, "--tasks TASK")
        with progress.shown("eval") as track:
            settings = {"overwrite": overwrite, "threads": threads, "device": device}
            run = replace(run_settings(Recipe(), track, **settings), trust_remote_code=trust_remote_code)
            places: dict[str, Any] = {"base": base, "residual": residual, "output": out}
            found = command(directories[0], names, evaluation_options(typed), run, **places)
        _show(directories[0], found, out)


def _compare(directories: Sequence[str], tasks: Sequence[str], given: Typed) -> None:
    """Print how the results of several directories differ; no model is loaded."""
    from svdconvert.cli.evaluation_comparison import show_comparison
    from svdconvert.evaluation.comparison import compare_evaluations

    if idle := [name for name, value in given.items() if value is not None]:
        raise typer.BadParameter(
            f"{spelled(idle[0])} changes nothing with --compare, which asks no model; leave it out"
        )
    found = compare_evaluations(directories, tasks)
    tell(
        summary=f"compared {len(directories)} directories",
        next=[],
        tasks=found.model_dump(mode="json")["tasks"],
    )
    show_comparison(found)


def _show(model: str, results: "Sequence[EvaluationResult]", out: Path | None) -> None:
    """Print the results of one model."""
    if not leads():
        return
    summaries.listing(_COLUMNS, [row for result in results for row in _rows(result)])
    for line in [line for result in results for line in _lines(result)]:
        summaries.show_line(line)
    place = (out or Path(model)) / "evaluations"
    summaries.summary(
        f"evaluated {model} on {', '.join(result.task for result in results)}",
        {"answers and results": place},
        facts={
            "directory": str(place),
            "results": [result.model_dump(mode="json") for result in results],
        },
    )


def _rows(result: "EvaluationResult") -> list[tuple[object, ...]]:
    """One row for each protocol."""
    return [
        (
            result.task,
            protocol,
            grade.n,
            grade.correct,
            f"{100 * grade.score:.2f} ± {100 * grade.standard_error:.2f}",
            f"{100 * grade.interval[0]:.1f} to {100 * grade.interval[1]:.1f}",
            grade.unanswered,
            grade.cut,
        )
        for protocol, grade in result.grades.items()
    ]


def _lines(result: "EvaluationResult") -> list[str]:
    """The other scores, what confined generated code, and published scores."""
    others = {name: value for name, value in result.metrics.items() if name != "accuracy"}
    lines = [f"{result.task}: {name} {100 * value:.2f} %" for name, value in others.items()]
    if result.sandbox:
        lines.append(f"{result.task}: programs were confined by {', '.join(result.sandbox)}")
    for row in result.published:
        rank = f", rank {row.rank}" if row.rank else ""
        lines.append(
            f"{result.task}: published {100 * row.score:.2f} % for {row.model}, {row.method}{rank}, "
            f"{row.data} ({row.source})"
        )
    return lines
