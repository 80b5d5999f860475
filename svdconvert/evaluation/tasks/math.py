"""MATH: 5,000 competition problems whose answers are numbers, formulas, points, intervals or words."""

from collections.abc import Sequence

from svdconvert.evaluation.base import DataSource, Grade, Limits, Protocol, Record, Row, Runner, Task
from svdconvert.evaluation.grading.math_answers import math_gold, paper_math, paper_math_pissa, strict_math
from svdconvert.evaluation.instructions import step_by_step
from svdconvert.evaluation.records import read_each, text_of

_GRADES = {"strict": strict_math, "paper": paper_math, "paper-pissa": paper_math_pissa}
_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def _row(number: int, record: Record) -> Row:
    solution = text_of(record, "solution", "output", "response")
    labels = {name: record[name] for name in ("level", "type") if isinstance(record.get(name), str)}
    problem = text_of(record, "problem", "instruction", "query")
    return Row(id=str(number), prompt=step_by_step(problem), gold=math_gold(solution), extra=labels)


def _rows(records: Sequence[Record]) -> list[Row]:
    return read_each(records, _row)


def _grade(row: Row, answer: str, protocol: Protocol, runner: Runner | None) -> Grade:
    correct, extracted = _GRADES[protocol](answer, str(row.gold))
    return Grade(correct, extracted is not None, extracted)


TASK = Task(
    name="math",
    summary="5,000 competition problems, solved step by step",
    version=1,
    data=DataSource(
        name="EleutherAI/hendrycks_math",
        configs=_SUBJECTS,
        revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
    ),
    rows=_rows,
    grade=_grade,
    limits={
        "strict": Limits(max_new_tokens=2048),
        "paper": Limits(max_new_tokens=2048),
        "paper-pissa": Limits(max_new_tokens=1024),
    },
    paper="SORSA and MiLoRA (paper), PiSSA (paper-pissa): zero-shot, Alpaca's prompt, greedy, merged weights",
)
