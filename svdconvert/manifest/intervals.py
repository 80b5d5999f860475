"""How exact a share of correct answers is."""

from math import sqrt

_Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def standard_error(correct: int, count: int) -> float:
    """sqrt(p (1 - p) / n), the standard error of a share p of n answers; 0 for none."""
    if count == 0:
        return 0.0
    share = correct / count
    return sqrt(share * (1.0 - share) / count)


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (E. B. Wilson, 1927), which holds for small counts and shares of 0.

    (0, 1) if there are no answers.
    """
    if count == 0:
        return 0.0, 1.0
    share = correct / count
    z2 = _Z95 * _Z95
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    low = 0.0 if correct == 0 else max(0.0, middle - half)
    high = 1.0 if correct == count else min(1.0, middle + half)
    return low, high
