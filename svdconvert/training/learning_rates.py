"""Which rate belongs to which method."""

from math import isclose

from svdconvert.methods.base import METHODS

_NEAR = 2.0  # within this factor of a method's own rate nothing is said


def learning_rate_warning(method: str, rate: float) -> str | None:
    """A sentence where `rate` is another method's and far from this one's, with both papers; else None."""
    own = METHODS.get(method)
    if 1 / _NEAR <= rate / own.learning_rate <= _NEAR:
        return None
    for name in METHODS.names():
        other = METHODS.get(name)
        if isclose(rate, other.learning_rate, rel_tol=1e-3):
            return (
                f"lr {rate:g} is the rate of {name} ({other.paper}); {method} is published with "
                f"{own.learning_rate:g} ({own.paper}), and its results hold for that"
            )
    return None
