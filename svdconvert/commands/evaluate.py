"""svdconvert eval: the scores of a model on the tasks of the papers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from svdconvert.checkpoint.file_names import shared_name
from svdconvert.config.evaluation import EvaluationOptions
from svdconvert.config.execution import Run
from svdconvert.config.progress import tracked
from svdconvert.errors import RecipeError
from svdconvert.evaluation.asking import Answering
from svdconvert.evaluation.base import Task, tasks_named
from svdconvert.evaluation.choices import check_choices
from svdconvert.evaluation.harness import evaluate_harness, is_harness, require_harness
from svdconvert.evaluation.loading import open_answering
from svdconvert.evaluation.questions import read_questions
from svdconvert.evaluation.run import CodeRunner, evaluate_task, refuse_misfit, regrade_task
from svdconvert.evaluation.sandbox.runner import Sandbox
from svdconvert.evaluation.store import TaskFiles, results_folder
from svdconvert.manifest.evaluations import EvaluationResult


@tracked
def evaluate(  # noqa: PLR0913 (what is evaluated, on what, how, and where the results go)
    directory: str | Path,
    tasks: Sequence[str],
    options: EvaluationOptions | None = None,
    run: Run | None = None,
    *,
    data: str | None = None,
    limit: int | None = None,
    base: str | None = None,
    residual: str | None = None,
    output: str | Path | None = None,
) -> list[EvaluationResult]:
    """Let the model of a directory, or `org/name`, answer `tasks`, and grade the answers.

    `tasks` are names of tasks, of groups of tasks, or harness:NAME. `data` and `limit` override those of
    `options`. Results and answers are written to `evaluations` in the directory, or in `output` if that is
    given; a run that was killed is continued. `base` and `residual` override locations in an adapter's
    manifest. Raises SvdConvertError with one sentence.
    """
    run = run or Run()
    options = options or EvaluationOptions()
    options = replace(options, data=data or options.data, limit=limit or options.limit)
    foreign = _harness_tasks(tasks, options)
    chosen = tasks_named([name for name in tasks if name not in foreign])
    check_choices(chosen, options)
    folder = results_folder(str(directory), Path(output) if output is not None else None)
    files = [TaskFiles(folder, task.name, run.ranks) for task in chosen]
    foreign_files = [TaskFiles(folder, name, run.ranks) for name in foreign.values()]
    code = _code_runner(chosen, options)
    if options.regrade:
        return [regrade_task(task, one, code) for task, one in zip(chosen, files, strict=True)]
    questions = [read_questions(task, options.data, options.limit) for task in chosen]
    opened = open_answering(directory, run, base=base, residual=residual)
    refuse_misfit(opened, chosen, foreign)
    if run.ranks.leads:
        for sentence in filter(None, (asked.idle_limit for asked in questions)):
            run.notify(sentence)
        for one in [*files, *foreign_files]:
            one.prepare(overwrite=run.overwrite)
    run.ranks.wait()
    model = Answering(opened, options, run)
    return [
        *(evaluate_task(model, asked, one, code) for asked, one in zip(questions, files, strict=True)),
        *(evaluate_harness(model, name, one) for name, one in zip(foreign, foreign_files, strict=True)),
    ]


def _harness_tasks(tasks: Sequence[str], options: EvaluationOptions) -> dict[str, str]:
    """The tasks of lm-evaluation-harness as they were given -> the names of their results.

    Raises RecipeError for an option that would change nothing, MissingPackageError without lm_eval.
    """
    found = {name: require_harness(name) for name in tasks if is_harness(name)}
    if twice := shared_name(found.values()):
        raise RecipeError(
            f"the tasks {twice[0]} and {twice[1]} would write one file of results, on this or on some disks; "
            "ask one at a time, with another -o"
        )
    idle = {
        "data": options.data,
        "max_new_tokens": options.max_new_tokens,
        "regrade": options.regrade or None,
    }
    for option, value in idle.items():
        if found and value is not None:
            raise RecipeError(
                f"`{option}` changes nothing for {next(iter(found))}, which lm-evaluation-harness asks and "
                "grades; leave it out"
            )
    return found


def _code_runner(tasks: Sequence[Task], options: EvaluationOptions) -> CodeRunner:
    """What runs the programs that a model wrote; nothing if no task needs it.

    Raises SandboxError if programs cannot be confined.
    """
    if not any(task.runs_code for task in tasks):
        return CodeRunner()
    sandbox = Sandbox.open(options.sandbox)
    return CodeRunner(sandbox.run, sandbox.layers)
