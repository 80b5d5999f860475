"""BoolQ: 3,270 questions that are answered with true or false, without the passage."""

from svdconvert.errors import DataError
from svdconvert.evaluation.base import DataSource, Record
from svdconvert.evaluation.commonsense import commonsense_task
from svdconvert.evaluation.records import text_of


def _read(record: Record) -> tuple[str, str]:
    answer = record.get("answer")
    if not isinstance(answer, bool):
        raise DataError(f"its answer is {str(answer)[:40]!r}, which is neither true nor false")
    question = text_of(record, "question")
    instruction = (
        f"Please answer the following question with true or false, question: {question}?\n\n"
        "Answer format: true/false"
    )
    return instruction, "true" if answer else "false"


TASK = commonsense_task(
    "boolq",
    "3,270 yes-no questions",
    ("true", "false"),
    DataSource(name="google/boolq", split="validation", revision="35b264d03638db9f4ce671b711558bf7ff0f80d5"),
    _read,
)
