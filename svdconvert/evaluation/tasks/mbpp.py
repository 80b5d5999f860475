"""MBPP: 500 Python functions to write from one sentence and three tests."""

import re
from collections.abc import Sequence

from svdconvert.evaluation.base import DataSource, Grade, Limits, Protocol, Record, Row, Runner, Task
from svdconvert.evaluation.grading.code_answers import joined, pissa_code, written_code
from svdconvert.evaluation.records import read_each, text_of, texts_of
from svdconvert.training.data.prompts import ALPACA

_SECONDS = 10.0  # a reference solution takes more than 3 on a slow machine

_QUESTION = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}"
)
_WRAPPERS = {"set", "sorted", "list", "tuple", "round", "abs", "len", "str", "math.isclose", "isclose"}


def _row(number: int, record: Record) -> Row:
    tests = texts_of(record, "test_list")
    if not tests:
        raise ValueError("its test_list is empty")
    setup = [text_of(record, "test_setup_code")] if record.get("test_setup_code") else []
    if record.get("test_imports"):
        setup += texts_of(record, "test_imports")
    text = text_of(record, "text", "prompt")
    question = _QUESTION.replace("{text}", text).replace("{tests}", "\n".join(tests))
    return Row(
        id=str(record.get("task_id", number)),
        prompt=ALPACA.replace("{prompt}", question),
        gold=text_of(record, "code"),
        extra={"name": _function(tests), "setup": setup, "tests": tests},
    )


def _function(tests: Sequence[str]) -> str:
    """The name of the function that the tests call."""
    for test in tests:
        for name in re.findall(r"(\w+)\s*\(", test):
            if name not in _WRAPPERS and name != "assert":
                return str(name)
    raise ValueError("its tests call no function")


def _rows(records: Sequence[Record]) -> list[Row]:
    return read_each(records, _row)


def program(row: Row, answer: str, protocol: Protocol) -> str | None:
    """The program that is run to grade an answer; None if the answer has no code.

    Raises ValueError if the published script stops with an error.
    """
    code = written_code(answer, row.extra["name"]) if protocol == "strict" else pissa_code(answer)
    return None if code is None else joined(code, row.extra["setup"], row.extra["tests"])


def _grade(row: Row, answer: str, protocol: Protocol, runner: Runner | None) -> Grade:
    assert runner is not None
    try:
        text = program(row, answer, protocol)
    except ValueError:
        return Grade(False, True, None)
    return Grade(text is not None and runner(text, _SECONDS), text is not None, text)


TASK = Task(
    name="mbpp",
    summary="500 short Python functions, graded by running their tests (needs --run-code)",
    version=1,
    data=DataSource(
        name="google-research-datasets/mbpp",
        configs=("full",),
        revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    ),
    rows=_rows,
    grade=_grade,
    limits={"strict": Limits(max_new_tokens=1024), "paper": Limits(max_new_tokens=1024)},
    runs_code=True,
    paper="PiSSA's extraction; its prompts are not published in its repository, MBPP's own wording is used",
)
