"""Grades the answers to a task: both protocols from the same answers, without the model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from svdconvert.evaluation.answering import cut_at_stop
from svdconvert.evaluation.base import Grade, Protocol, Row, Runner, Task
from svdconvert.manifest.evaluations import GradeCount
from svdconvert.manifest.intervals import standard_error, wilson_interval

_STRICT: Protocol = "strict"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One row with the model's answer."""

    row: Row
    answer: str
    tokens: int = 0
    end: str = "end"
    lengths: Mapping[str, int] = field(default_factory=dict)
    """As in `answering.Answer`; JSON has the limits as text."""

    def under(self, task: Task, protocol: Protocol) -> tuple[str, bool]:
        """(the answer as the protocol's limits cut it, whether its limit of tokens did)."""
        limits = task.limits.get(protocol)
        if limits is None:
            return self.answer, False
        text = self.answer
        is_cut = self.end == "limit"
        if (length := self.lengths.get(str(limits.max_new_tokens))) is not None:
            text = text[:length]
            is_cut = True
        whole = cut_at_stop(text, limits.stops)
        return whole, is_cut and len(whole) == len(text)


@dataclass(frozen=True, slots=True)
class Graded:
    """The answers with their grades, and what these amount to."""

    lines: Sequence[Mapping[str, Any]]
    """One for each row, as the file of answers has them."""
    grades: Mapping[Protocol, GradeCount]
    metrics: Mapping[str, float]


def grade_all(task: Task, answered: Sequence[Answered], runner: Runner | None = None) -> Graded:
    """Grade all answers; `runner` runs programs, for the tasks that need one."""
    lines: list[dict[str, Any]] = [_line(one) for one in answered]
    grades: dict[Protocol, GradeCount] = {}
    for protocol in task.protocols:
        found = [one.under(task, protocol) for one in answered]
        graded = [
            task.grade(one.row, text, protocol, runner)
            for one, (text, _) in zip(answered, found, strict=True)
        ]
        for line, grade in zip(lines, graded, strict=True):
            line[protocol] = asdict(grade)
        grades[protocol] = _count(graded, [is_cut for _, is_cut in found])
    texts = [one.under(task, _STRICT)[0] for one in answered]
    metrics = dict(task.metrics([one.row for one in answered], texts))
    metrics.setdefault(task.headline, grades[_STRICT].score)
    return Graded(lines, grades, metrics)


def _count(grades: Sequence[Grade], cut: Sequence[bool]) -> GradeCount:
    count = len(grades)
    correct = sum(grade.correct for grade in grades)
    return GradeCount(
        n=count,
        correct=correct,
        unanswered=sum(not grade.answered for grade in grades),
        cut=sum(cut),
        score=correct / count if count else 0.0,
        standard_error=standard_error(correct, count),
        interval=wilson_interval(correct, count),
    )


def _line(one: Answered) -> dict[str, Any]:
    row = one.row
    return {
        "id": row.id,
        "prompt": row.prompt,
        "gold": row.gold,
        "extra": dict(row.extra),
        "answer": one.answer,
        "tokens": one.tokens,
        "end": one.end,
        "lengths": dict(one.lengths),
    }


def of_line(line: Mapping[str, Any]) -> Answered:
    """The inverse of what `grade_all` makes of an answer. Raises KeyError or TypeError for anything else."""
    row = Row(id=str(line["id"]), prompt=str(line["prompt"]), gold=line["gold"], extra=dict(line["extra"]))
    lengths = {str(limit): int(length) for limit, length in dict(line["lengths"]).items()}
    return Answered(
        row=row,
        answer=str(line["answer"]),
        tokens=int(line["tokens"]),
        end=str(line["end"]),
        lengths=lengths,
    )
