"""RTE: 277 pairs of texts: does the second follow from the first?"""

from svdconvert.evaluation.glue import classification_task

TASK = classification_task(
    "rte",
    "277 pairs of texts: does the second follow",
    (("sentence1",), ("sentence2",)),
    ("entailment", "not_entailment"),
)
