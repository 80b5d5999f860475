"""QQP: 40,430 pairs of questions: do both ask the same?"""

from svdconvert.evaluation.glue import classification_task

TASK = classification_task(
    "qqp",
    "40,430 pairs of questions: the same or not",
    (("question1",), ("question2",)),
    ("not_duplicate", "duplicate"),
)
