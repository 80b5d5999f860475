"""Statistics of two models on the same questions, against scipy."""

from math import sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdconvert.evaluation.pairs import mcnemar, paired_interval


@settings(deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_of_many_rows_does_not_overflow() -> None:
    assert 0 < mcnemar(24_000, 25_000) < 1e-4
    assert mcnemar(0, 5000) == 0.0 or mcnemar(0, 5000) < 1e-300


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_the_interval_holds_the_difference_and_mirrors(first: int, second: int, equal: int) -> None:
    count = first + second + equal
    low, high = paired_interval(first, second, count)
    assert -1 <= low <= high <= 1
    if count:
        # Agresti and Min's estimate, written out from the four cells with half a row more in each.
        cells = [x + 0.5 for x in (first, second)]
        total = count + 2
        difference = (cells[1] - cells[0]) / total
        variance = (sum(cells) - (cells[1] - cells[0]) ** 2 / total) / total**2
        half = 1.959963984540054 * sqrt(variance)
        assert low == pytest.approx(max(-1, difference - half)) and high == pytest.approx(
            min(1, difference + half)
        )
        mirrored = paired_interval(second, first, count)
        assert mirrored == pytest.approx((-high, -low))
