"""PIQA: 1,838 everyday goals, each with two ways to reach it."""

from svdconvert.evaluation.base import DataSource, Record
from svdconvert.evaluation.commonsense import answer_format, commonsense_task
from svdconvert.evaluation.records import index_of, text_of


def _read(record: Record) -> tuple[str, str]:
    instruction = (
        f"Please choose the correct solution to the question: {text_of(record, 'goal')}\n\n"
        f"Solution1: {text_of(record, 'sol1')}\n\nSolution2: {text_of(record, 'sol2')}\n\n"
        f"{answer_format('solution', 2)}"
    )
    return instruction, f"solution{index_of(record, 'label', 2) + 1}"


TASK = commonsense_task(
    "piqa",
    "1,838 goals with two ways to reach each",
    ("solution1", "solution2"),
    DataSource(
        name="lighteval/piqa",
        configs=("plain_text",),
        split="validation",
        revision="41782e6bf0ef7de82a2ca8a9feb1dca042837fae",
    ),
    _read,
)
