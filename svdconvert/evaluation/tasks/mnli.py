"""MNLI, matched: 9,815 pairs of texts of the genres that were trained on."""

from svdconvert.evaluation.glue import classification_task

TASK = classification_task(
    "mnli",
    "9,815 pairs of texts: does the second follow",
    (("premise", "sentence1"), ("hypothesis", "sentence2")),
    ("entailment", "neutral", "contradiction"),
    split="validation_matched",
)
