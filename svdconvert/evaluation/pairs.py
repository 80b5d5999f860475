"""The exact McNemar test: are two models different, judged by the questions that both answered?"""


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p value; each of two models alone is right on `only_first` and `only_second` rows.

    Under equal models each of these rows falls to either with probability 1/2, so p is
    2 * P(X <= min(...)) of a binomial distribution, at most 1 (Q. McNemar, 1947; exact form).
    """
    count = only_first + only_second
    term = 1
    total = 0
    for successes in range(min(only_first, only_second) + 1):
        total += term
        term = term * (count - successes) // (successes + 1)
    # Integers of any size: their quotient is rounded once.
    return min(1.0, 2 * total / (1 << count))


def paired_interval(only_first: int, only_second: int, count: int) -> tuple[float, float]:
    """The 95 % interval of the second share minus the first, on the same `count` rows.

    Wald's with the correction of Agresti and Min (2005): half a row is added to each of the four cells.
    """
    if count == 0:
        return -1.0, 1.0
    total = count + 2.0
    first = (only_first + 0.5) / total
    second = (only_second + 0.5) / total
    difference = second - first
    half = 1.959963984540054 * ((first + second - difference * difference) / total) ** 0.5
    return max(-1.0, difference - half), min(1.0, difference + half)
