"""STS-B: 1,500 pairs of sentences: how near are their meanings, from 0 to 5?"""

from svdconvert.evaluation.glue import regression_task

TASK = regression_task(
    "stsb",
    "1,500 pairs of sentences: how near are their meanings, from 0 to 5",
    (("sentence1",), ("sentence2",)),
    nearness=0.5,
)
