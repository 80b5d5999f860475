"""CoLA: 1,043 sentences: is the sentence good English?"""

from svdconvert.evaluation.glue import classification_task

TASK = classification_task(
    "cola",
    "1,043 sentences: good English or not",
    (("sentence",),),
    ("unacceptable", "acceptable"),
    headline="matthews",
)
