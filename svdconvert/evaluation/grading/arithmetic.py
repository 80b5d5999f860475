"""Arithmetic with exact fractions where possible and complex numbers else, in bounded time and memory."""

import math
from fractions import Fraction

Value = Fraction | complex
_MOST_BITS = 20_000
_LARGEST_FACTORIAL = 1000


def _bounded(value: Value) -> Value:
    if (
        isinstance(value, Fraction)
        and max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS
    ):
        raise OverflowError("too many digits")
    return value


def add(one: Value, other: Value) -> Value:
    return _bounded(one + other)


def multiply(one: Value, other: Value) -> Value:
    return _bounded(one * other)


def divide(one: Value, other: Value) -> Value:
    return _bounded(one / other)


def absolute(value: Value) -> Value:
    return abs(value) if isinstance(value, Fraction) else complex(abs(value))


def factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= _LARGEST_FACTORIAL:
        raise ValueError("no factorial")
    return Fraction(math.factorial(value.numerator))


def real_if_close(value: complex) -> complex:
    return complex(value.real) if abs(value.imag) < 1e-15 * abs(value.real) else value


def power(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator == 1:
            if abs(exponent.numerator) * bits > _MOST_BITS:
                raise OverflowError("too many digits")
            return base**exponent.numerator
        exact = _exact_root(base, exponent)
        if exact is not None:
            return exact
        if base < 0 and exponent.denominator % 2:
            # The real root of a negative number, as in school.
            sign = -1 if exponent.numerator % 2 else 1
            return complex(sign * float(-base) ** float(exponent))
    return complex(base) ** complex(exponent)


def _exact_root(base: Fraction, exponent: Fraction) -> Fraction | None:
    """base ** (1 / 2) if it is rational."""
    if exponent != Fraction(1, 2) or base < 0:
        return None
    root = Fraction(math.isqrt(base.numerator), math.isqrt(base.denominator))
    return root if root * root == base else None
