"""MRPC: 408 pairs of sentences from the news: do both say the same?"""

from svdconvert.evaluation.glue import classification_task

TASK = classification_task(
    "mrpc",
    "408 pairs of sentences: the same or not",
    (("sentence1", "#1 String"), ("sentence2", "#2 String")),
    ("not_equivalent", "equivalent"),
)
