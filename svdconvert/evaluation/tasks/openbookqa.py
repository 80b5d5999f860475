"""OpenBookQA: 500 questions about elementary science."""

from svdconvert.evaluation.base import DataSource
from svdconvert.evaluation.commonsense import commonsense_task, read_science_question

TASK = commonsense_task(
    "openbookqa",
    "500 questions about elementary science",
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    DataSource(
        name="allenai/openbookqa", configs=("main",), revision="388097ea7776314e93a529163e0fea805b8a6454"
    ),
    read_science_question,
)
