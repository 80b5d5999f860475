"""Evaluates a model on tasks: questions, answers in batches, grades, results."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from time import monotonic
from typing import Any

import torch

from svdconvert.config.execution import Run
from svdconvert.config.progress import report
from svdconvert.errors import ArtifactError
from svdconvert.evaluation.answering import Answer, plan_batches
from svdconvert.evaluation.asking import Answering, Asked, ask
from svdconvert.evaluation.base import Runner, Task
from svdconvert.evaluation.loading import Opened
from svdconvert.evaluation.published import published_rows
from svdconvert.evaluation.questions import Questions
from svdconvert.evaluation.scores import Answered, Graded, grade_all
from svdconvert.evaluation.store import Progressing, TaskFiles, progressing
from svdconvert.linalg.threads import use_threads
from svdconvert.manifest.evaluations import EvaluatedData, EvaluatedModel, EvaluationResult, read_evaluation
from svdconvert.version import __version__


@dataclass(frozen=True)
class CodeRunner:
    """What runs the programs that a model wrote, for the tasks that need it."""

    run: Runner | None = None
    layers: tuple[str, ...] = ()
    """What confines the programs."""


def refuse_misfit(opened: Opened, tasks: Sequence[Task], foreign: Collection[str] = ()) -> None:
    """Raise ArtifactError for a task that this kind of model cannot answer.

    `foreign` are tasks of lm-evaluation-harness, which are for models that write text.
    """
    for name in foreign:
        if opened.labels is not None:
            raise ArtifactError(
                f"{name} needs a model that writes text, and {opened.identity.name} is a classifier"
            )
    for task in tasks:
        if task.kind == "classify" and opened.labels is None:
            raise ArtifactError(
                f"{task.name} needs a classifier, and {opened.identity.name} writes text; train one with "
                "train --task classify"
            )
        if task.kind == "generate" and opened.labels is not None:
            raise ArtifactError(
                f"{task.name} needs a model that writes text, and {opened.identity.name} is a classifier"
            )


def evaluate_task(
    model: Answering, questions: Questions, files: TaskFiles, code: CodeRunner
) -> EvaluationResult:
    """The result of one task: the one that is there, or a new one, continued from what a killed run left."""
    run = model.run
    use_threads(run.threads or files.threads())
    asked = ask(model, questions)
    identity = _identity(model, questions, asked)
    if (found := files.finished(identity)) is not None:
        if run.ranks.leads:
            files.remove_partials()
        run.notify(f"{questions.task.name}: {files.result} is there; `overwrite` asks the model again")
        return found
    ids = [row.id for row in questions.rows]
    plan = plan_batches(asked.lengths, asked.batch_size)
    with progressing(files, identity, [[ids[row] for row in batch] for batch in plan]) as state:
        _answer_batches(state, plan, asked, questions.task.name, run)
        state.complete()
        answered = [Answered(row=row, **state.record(row.id)) for row in questions.rows]
        if run.ranks.leads:
            graded = grade_all(questions.task, answered, code.run)
            files.write(_result(questions.task, model.opened, graded, state, code), graded)
    run.ranks.wait()
    if run.ranks.leads:
        files.remove_partials()
    return read_evaluation(files.result)


def _answer_batches(
    state: Progressing, plan: Sequence[Sequence[int]], asked: Asked, name: str, run: Run
) -> None:
    """Answer this rank's missing batches."""
    own = state.open()
    total = sum(map(len, plan))
    done = total - sum(len(plan[number]) for number in own)
    if own and state.records:
        run.notify(f"{name}: going on after {done} of {total} answers")
    report("answer", done, total, "rows", name=name)
    for number in own:
        start = monotonic()
        answers = asked.answer(plan[number])
        state.add(number, [_record(answer) for answer in answers], monotonic() - start)
        done += len(plan[number])
        report("answer", done, total, "rows", name=name)


def _record(answer: Answer) -> dict[str, Any]:
    values = asdict(answer)
    values["lengths"] = {str(limit): length for limit, length in answer.lengths.items()}
    return {"answer": values.pop("text")} | values


def _identity(model: Answering, questions: Questions, asked: Asked) -> dict[str, Any]:
    """Everything that shapes the answers: a run is continued only if it is the same."""
    asked_model = _asked_model(model, asked)
    return {
        "task": questions.task.name,
        "version": questions.task.version,
        "data": questions.data.model_dump(mode="json"),
        "model": {key: value for key, value in asked_model.model_dump(mode="json").items() if key != "name"},
        "options": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch_size": asked.batch_size,
            **asked.options,
            "device": next(model.network.parameters()).device.type,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "svdconvert": __version__,
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
        },
    }


def _asked_model(model: Answering, asked: Asked) -> EvaluatedModel:
    """The model, and how it is asked."""
    opened = model.opened
    weights = "own"
    if opened.adapter is not None:
        weights = "residual" if opened.adapter[1].is_residual else "base"
    return opened.identity.model_copy(update={"weights": weights, "prompts": asked.prompts})


def _result(
    task: Task, opened: Opened, graded: Graded, state: Progressing, code: CodeRunner
) -> EvaluationResult:
    identity = state.identity
    model = EvaluatedModel(**identity["model"], name=opened.identity.name)
    published = published_rows(task.name, opened.base_name, model.method, model.rank, opened.trained_on)
    return EvaluationResult(
        task=task.name,
        version=task.version,
        data=EvaluatedData(**identity["data"]),
        model=model,
        options=identity["options"],
        grades=graded.grades,
        metrics=graded.metrics,
        headline=task.headline,
        seconds=round(state.seconds, 3),
        tokens=sum(int(line["tokens"]) for line in graded.lines),
        sandbox=code.layers if task.runs_code else (),
        published=tuple(published),
        versions=identity["versions"],
    )


def regrade_task(task: Task, files: TaskFiles, code: CodeRunner) -> EvaluationResult:
    """Grade the stored answers again.

    Raises ArtifactError if there are none, or if they answer other prompts.
    """
    if not files.result.exists():
        raise ArtifactError(
            f"{files.result} does not exist, so there is nothing to grade; leave `regrade` out"
        )
    before = read_evaluation(files.result)
    if before.version != task.version:
        raise ArtifactError(
            f"{files.answers} holds answers to version {before.version} of {task.name}, whose prompts or "
            f"limits differ from those of version {task.version}; evaluate again with `overwrite`"
        )
    graded = grade_all(task, files.read_answers(), code.run)
    after = before.model_copy(
        update={
            "grades": graded.grades,
            "metrics": dict(graded.metrics),
            "headline": task.headline,
            "sandbox": code.layers if task.runs_code else (),
        }
    )
    files.write(after, graded)
    return after
