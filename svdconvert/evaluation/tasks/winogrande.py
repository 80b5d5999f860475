"""WinoGrande: 1,267 sentences with a gap that one of two names fills."""

from svdconvert.evaluation.base import DataSource, Record
from svdconvert.evaluation.commonsense import answer_format, commonsense_task, listed
from svdconvert.evaluation.records import index_of, text_of


def _read(record: Record) -> tuple[str, str]:
    options = [text_of(record, name) for name in ("option1", "option2")]
    instruction = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{text_of(record, 'sentence')}\n\n{listed('Option', options)} {answer_format('option', 2)}"
    )
    return instruction, f"option{index_of(record, 'answer', 2, first=1) + 1}"


TASK = commonsense_task(
    "winogrande",
    "1,267 sentences with a gap and two names",
    ("option1", "option2"),
    DataSource(
        name="allenai/winogrande",
        configs=("winogrande_xl",),
        split="validation",
        revision="01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    ),
    _read,
)
