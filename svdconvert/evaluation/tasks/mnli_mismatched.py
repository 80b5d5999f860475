"""MNLI, mismatched: 9,832 pairs of texts of other genres than those that were trained on."""

from svdconvert.evaluation.glue import classification_task

TASK = classification_task(
    "mnli-mismatched",
    "9,832 pairs of texts of other genres",
    (("premise", "sentence1"), ("hypothesis", "sentence2")),
    ("entailment", "neutral", "contradiction"),
    split="validation_mismatched",
)
