"""ARC-Easy: 2,376 science questions of school exams."""

from svdconvert.evaluation.base import DataSource
from svdconvert.evaluation.commonsense import commonsense_task, read_science_question

TASK = commonsense_task(
    "arc-easy",
    "2,376 science questions",
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    DataSource(
        name="allenai/ai2_arc", configs=("ARC-Easy",), revision="210d026faf9955653af8916fad021475a3f00453"
    ),
    read_science_question,
)
