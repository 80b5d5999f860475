"""QNLI: 5,463 questions with a sentence: does the sentence hold the answer?"""

from svdconvert.evaluation.glue import classification_task

TASK = classification_task(
    "qnli",
    "5,463 questions with a sentence: does it hold the answer",
    (("question",), ("sentence",)),
    ("entailment", "not_entailment"),
)
