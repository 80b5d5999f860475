"""What the tasks and options of an evaluation exclude, before a model is opened or a row is read."""

from collections.abc import Sequence

from svdconvert.config.evaluation import EvaluationOptions
from svdconvert.errors import RecipeError, SandboxError
from svdconvert.evaluation.base import Task


def check_choices(tasks: Sequence[Task], options: EvaluationOptions) -> None:
    """Raise RecipeError for rows of one task that are given to several, or for consent that none needs.

    Raises SandboxError if a task runs what the model wrote and that was not asked for.
    """
    if options.data is not None and len(tasks) > 1:
        raise RecipeError(
            f"`data` {options.data} holds the rows of one task, and {', '.join(task.name for task in tasks)} "
            "are several; give one task"
        )
    running = [task.name for task in tasks if task.runs_code]
    if not running and options.run_code:
        raise RecipeError("`run_code` changes nothing, because none of these tasks runs code; leave it out")
    if running and not options.run_code:
        raise SandboxError(
            f"{running[0]} runs what the model wrote, to see whether it works; give `run_code`"
        )
