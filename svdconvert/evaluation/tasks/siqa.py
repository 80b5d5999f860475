"""Social IQa: 1,954 questions about what people do and feel, with three answers each."""

from svdconvert.evaluation.base import DataSource, Record
from svdconvert.evaluation.commonsense import answer_format, commonsense_task, listed
from svdconvert.evaluation.records import index_of, text_of


def _read(record: Record) -> tuple[str, str]:
    answers = [text_of(record, name) for name in ("answerA", "answerB", "answerC")]
    instruction = (
        f"Please choose the correct answer to the question: {text_of(record, 'context')} "
        f"{text_of(record, 'question')}\n\n{listed('Answer', answers)}\n\n{answer_format('answer', 3)}"
    )
    return instruction, f"answer{index_of(record, 'label', 3, first=1) + 1}"


TASK = commonsense_task(
    "siqa",
    "1,954 questions about social situations",
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    DataSource(
        name="lighteval/siqa", split="validation", revision="54c6a1f8cb6daf4f5abf24a601852612fb35eb25"
    ),
    _read,
)
