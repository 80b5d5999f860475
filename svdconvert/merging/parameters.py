"""The parameters that several methods have, with mergekit's names, defaults and bounds."""

from svdconvert.merging.base import Parameter

WEIGHT = Parameter(
    name="weight", default=1.0, per_model=True, required=True, summary="factor of each model's change"
)
DENSITY = Parameter(
    name="density",
    default=1.0,
    per_model=True,
    least=0.0,
    most=1.0,
    summary="share of entries that is kept",
)
GAMMA = Parameter(
    name="gamma",
    default=0.01,
    per_model=True,
    least=0.0,
    most=1.0,
    summary="share of large entries left out",
)
EPSILON = Parameter(
    name="epsilon",
    default=0.15,
    per_model=True,
    least=0.0,
    most=1.0,
    summary="half the width of probabilities",
)
LAMBDA = Parameter(name="lambda", default=1.0, summary="factor of the merged change")


def normalize(default: bool) -> Parameter:
    """Divide by the sum of the weights."""
    return Parameter(name="normalize", default=default, summary="divide by the sum of the weights")


def rescale(default: bool) -> Parameter:
    """Keep the L1 norm of a change whose entries were removed."""
    return Parameter(name="rescale", default=default, summary="keep the L1 norm of each change")


MASK = Parameter(name="int8_mask", default=False, summary="accepted for mergekit's files; no effect")
