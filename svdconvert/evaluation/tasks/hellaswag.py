"""HellaSwag: 10,042 beginnings of a text, each with four endings."""

from svdconvert.evaluation.base import DataSource, Record
from svdconvert.evaluation.commonsense import answer_format, commonsense_task, listed
from svdconvert.evaluation.records import index_of, text_of, texts_of


def _read(record: Record) -> tuple[str, str]:
    endings = texts_of(record, "endings")
    sentence = f"{text_of(record, 'activity_label')}: {text_of(record, 'ctx')}"
    instruction = (
        f"Please choose the correct ending to complete the given sentence: {sentence}\n\n"
        f"{listed('Ending', endings)}\n\n{answer_format('ending', 4)}"
    )
    return instruction, f"ending{index_of(record, 'label', 4) + 1}"


TASK = commonsense_task(
    "hellaswag",
    "10,042 texts with four endings each",
    ("ending1", "ending2", "ending3", "ending4"),
    DataSource(
        name="Rowan/hellaswag", split="validation", revision="218ec52e09a7e7462a5400043bb9a69a41d06b76"
    ),
    _read,
)
