"""SST-2: 872 sentences about films: does the author like the film?"""

from svdconvert.evaluation.glue import classification_task

TASK = classification_task(
    "sst2",
    "872 sentences about films: praise or not",
    (("sentence",),),
    ("negative", "positive"),
)
