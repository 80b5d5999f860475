"""What an evaluation task is: rows with prompts, limits of the answers, and how answers are graded.

A task is data and pure functions. It knows nothing of models, and a row's grade depends only on the row, the
answer's text and the protocol. One file in `svdconvert/evaluation/tasks`, or an entry point of the group
`svdconvert.evaluation.tasks`, holds one task in its variable TASK.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from svdconvert.errors import UnknownNameError, did_you_mean
from svdconvert.plugins import Registry

Record = Mapping[str, Any]
"""A row of a data set, by the names of its fields."""

Protocol = Literal["strict", "paper", "paper-pissa"]
"""`strict` is right; `paper` grades as the published code does, with its faults, and `paper-pissa` as PiSSA's
does if that differs."""
PROTOCOLS: tuple[Protocol, ...] = ("strict", "paper")
"""Those of a task without limits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One question of a task."""

    id: str
    """Unique among the rows of the task."""
    prompt: str
    """All text before the answer; for a classifier, the text or the first of two."""
    gold: Any
    """The right answer, as a JSON value."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What grading needs in addition. For a classifier, `second` is the second of two texts."""


@dataclass(frozen=True, slots=True)
class Grade:
    """What an answer is worth."""

    correct: bool
    answered: bool
    """False if the answer holds nothing that could be right or wrong."""
    extracted: str | None = None
    """The part of the answer that was compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What ends an answer, unless the model ends it."""

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """The data set on the Hub, or the file, that has a task's rows."""

    name: str
    """ORG/NAME."""
    configs: tuple[str | None, ...] = (None,)
    """The configurations whose rows, one after another, are the task's; None for the default one."""
    split: str = "test"
    revision: str | None = None


Runner = Callable[[str, float], bool]
"""(program, seconds) -> True if the Python program ends without an error within the time.

Only tasks with `runs_code` get one; any other call of theirs is with None.
"""
Grader = Callable[[Row, str, Protocol, Runner | None], Grade]
"""(row, the answer as this protocol cuts it, protocol, runner) -> grade."""


def no_metrics(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
    """The default of `Task.metrics`: none in addition to the share of correct answers."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. Both grades are made from the same answers, so both protocols share the prompt."""

    name: str
    summary: str
    """One line for `svdconvert list tasks`."""
    version: int
    """Raised whenever the prompt or the limits change; a change of the grades needs only `eval --regrade`."""
    data: DataSource
    rows: Callable[[Sequence[Record]], list[Row]]
    """Records in the order of the data set -> one row for each. Raises DataError, which names the record."""
    grade: Grader
    kind: Literal["generate", "classify"] = "generate"
    """Whether the answer is text that the model writes, or the label that a classifier predicts."""
    limits: Mapping[Protocol, Limits] = field(default_factory=dict)
    """For every protocol of the task; empty for a classifier, which has the usual two."""
    headline: str = "accuracy"
    """The score that stands for the task: the share of correct answers, unless `metrics` has this name."""
    metrics: Callable[[Sequence[Row], Sequence[str]], Mapping[str, float]] = no_metrics
    """(rows, answers) -> scores that depend on all answers together, such as F1."""
    groups: tuple[str, ...] = ()
    """Names under which it is asked for together with others, such as commonsense or glue."""
    runs_code: bool = False
    """True if grading runs what the model wrote."""
    paper: str = ""
    """The source of its protocol."""

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """The protocols under which its answers are graded."""
        return tuple(self.limits) or PROTOCOLS


TASKS: Registry[Task] = Registry("svdconvert.evaluation.tasks", "TASK", Task)


def tasks_named(names: Sequence[str]) -> list[Task]:
    """The tasks with these names, and those of the groups with these names, each once.

    Raises UnknownNameError, which suggests the nearest name, and PluginError.
    """
    found: dict[str, Task] = {}
    for name in names:
        for task in [TASKS.get(name)] if name in TASKS.names() else _group(name):
            found.setdefault(task.name, task)
    return list(found.values())


def _group(name: str) -> list[Task]:
    loaded, _ = TASKS.load_all()
    members = [task for task in loaded.values() if name in task.groups]
    if not members:
        groups = {group for task in loaded.values() for group in task.groups}
        raise UnknownNameError(f"there is no task {name!r}; {did_you_mean(name, {*loaded, *groups})}")
    return members
