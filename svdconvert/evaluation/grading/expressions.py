"""Formulas in LaTeX or plain text: read, evaluated, and compared by their values.

A generated answer must not be given to sympy: its parser passes the text to Python's `eval`. The grammar here
knows arithmetic only, everything is bounded, and values are exact fractions as long as the operations allow
it. Two formulas are taken for equal if they have equal values for several values of their letters.
"""

import cmath
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from svdconvert.evaluation.grading.arithmetic import (
    Value,
    absolute,
    add,
    divide,
    factorial,
    multiply,
    power,
    real_if_close,
)

LONGEST = 500
"""Characters of a formula that is read."""
_DEEPEST = 30

Letters = Mapping[str, Value]
Formula = Callable[[Letters], Value]
"""(values of the letters) -> value. Raises ArithmeticError or ValueError if there is none."""

_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "ln": cmath.log,
    "log": cmath.log10,
    "exp": cmath.exp,
}
_CONSTANTS: dict[str, Value] = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}
_SYMBOLS = {
    "\\cdot": "*",
    "\\times": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "\\lvert": "|",
    "\\rvert": "|",
    "\\,": "",
    "\\;": "",
    "\\!": "",
    "\\:": "",
    "\\ ": "",
    "\\{": "(",
    "\\}": ")",
    "**": "^",
    "−": "-",
    "·": "*",
    "×": "*",
    "÷": "/",
    "π": "\\pi",
    "√": "\\sqrt",
    "^\\circ": "",
    "^{\\circ}": "",
}
_REPLACED = re.compile(
    "|".join(
        re.escape(mark) + (r"(?![a-z])" if mark[-1].isalpha() else "")
        for mark in sorted(_SYMBOLS, reverse=True)
    )
)
_TOKEN = re.compile(r"\\[A-Za-z]+|[A-Za-z]+|\d+(?:\.\d+)?|\.\d+|[-+*/^!|(){}\[\]_]")
_SPACE = re.compile(r"[\s~]+")
_GREEK = frozenset(
    (
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "theta",
        "lambda",
        "mu",
        "nu",
        "rho",
        "sigma",
        "tau",
        "phi",
    )
)
_OPENING = {"(": ")", "[": "]", "{": "}"}


class NoFormulaError(ValueError):
    """The text is not a formula of this grammar."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A formula and its letters."""

    value: Formula
    letters: frozenset[str]

    def at(self, letters: Letters) -> Value | None:
        """The value; None if there is none, as for a division by zero."""
        try:
            value = self.value(letters)
        except (ArithmeticError, ValueError):
            return None
        return value if isinstance(value, Fraction) or cmath.isfinite(value) else None


def parse(text: str, *, mixed_numbers: bool = True) -> Expression | None:
    """The formula that `text` is; None if it is none, or too long.

    With `mixed_numbers`, 2\\frac{1}{3} is 2 + 1/3, as in the answers of MATH, and else 2 * 1/3.
    """
    if len(text) > LONGEST:
        return None
    text = _REPLACED.sub(lambda match: _SYMBOLS[match[0]], text)
    tokens: list[str] = []
    position = 0
    for match in _TOKEN.finditer(text):
        if _SPACE.sub("", text[position : match.start()]):
            return None
        position = match.end()
        tokens.append(match[0])
    if not tokens or _SPACE.sub("", text[position:]):
        return None
    parser = _Parser(tokens, mixed_numbers)
    try:
        return Expression(parser.whole(), frozenset(parser.letters))
    except NoFormulaError:
        return None


def values_equal(first: Expression, second: Expression) -> bool:
    """True if both formulas have equal values at all of five points, as far as they have values."""
    letters = first.letters | second.letters
    agreed = 0
    for number in range(5 if letters else 1):
        point = {letter: _sample(letter, number) for letter in letters}
        one = first.at(point)
        other = second.at(point)
        if one is None or other is None:
            continue
        if not _equal(one, other):
            return False
        agreed += 1
    return agreed >= (3 if letters else 1)


def _sample(letter: str, number: int) -> Fraction:
    """A rational number that looks random and is the same in every process, of both signs."""
    draw = zlib.crc32(f"{letter} {number}".encode())
    return Fraction(draw % 1009 + 101, draw // 1009 % 499 + 211) * (-1 if number % 2 else 1)


def _equal(one: Value, other: Value) -> bool:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    try:
        return cmath.isclose(complex(one), complex(other), rel_tol=1e-11, abs_tol=1e-12)
    except OverflowError:
        return False


class _Parser:
    """Recursive descent: a sum of products of powers."""

    def __init__(self, tokens: Sequence[str], mixed_numbers: bool) -> None:
        self._tokens = list(tokens)
        self._next = 0
        self._depth = 0
        self._mixed = mixed_numbers
        self.letters: set[str] = set()

    @property
    def _token(self) -> str:
        """The next token; empty at the end."""
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._token
        self._next += 1
        return token

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise NoFormulaError(token)

    def whole(self) -> Formula:
        value = self._sum()
        self._expect("")
        return value

    def _sum(self) -> Formula:
        terms = [self._product()]
        while self._token and self._token in "+-":
            sign = self._take()
            term = self._product()
            terms.append(_negated(term) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else lambda at: _fold(add, [term(at) for term in terms])

    def _product(self) -> Formula:
        signs = 0
        while self._token and self._token in "+-":
            signs += self._take() == "-"
        value = self._factors()
        return _negated(value) if signs % 2 else value

    def _factors(self) -> Formula:
        factors = [self._power()]
        while True:
            if self._token and self._token in "*/":
                operator = self._take()
                negative = self._token == "-" and self._take() == "-"
                factor = self._power()
                factor = _negated(factor) if negative else factor
                factors.append(_reciprocal(factor) if operator == "/" else factor)
            elif self._begins_factor():
                factors.append(self._power())
            else:
                return (
                    factors[0] if len(factors) == 1 else lambda at: _fold(multiply, [f(at) for f in factors])
                )

    def _begins_factor(self) -> bool:
        token = self._token
        return bool(token) and (token in _OPENING or token[0].isalpha() or token[0] == "\\")

    def _power(self) -> Formula:
        base = self._atom()
        while self._token == "!":
            self._take()
            base = _applied(factorial, base)
        if self._token == "^":
            self._take()
            exponent = self._exponent()
            return lambda at: power(base(at), exponent(at))
        return base

    def _exponent(self) -> Formula:
        if self._token == "-":
            self._take()
            return _negated(self._power())
        return self._power() if self._token not in _OPENING else self._atom()

    def _atom(self) -> Formula:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise NoFormulaError("too deep")
        value = self._one_atom(self._take())
        self._depth -= 1
        return value

    def _one_atom(self, token: str) -> Formula:
        if token in _OPENING and token:
            value = self._sum()
            self._expect(_OPENING[token])
            return value
        if token == "|":
            value = self._sum()
            self._expect("|")
            return _applied(absolute, value)
        if token[:1].isdigit() or token[:1] == ".":
            return self._number(token)
        return self._word(token.removeprefix("\\"), token.startswith("\\"))

    def _number(self, token: str) -> Formula:
        number = Fraction(token)
        following = self._tokens[self._next : self._next + 7]
        if self._mixed and re.fullmatch(
            r"\\frac \{ \d+ \} \{ \d+ \}", " ".join(following).replace("\\dfrac", "\\frac")
        ):
            part = self._atom()
            return lambda at: number + part(at)
        return lambda at: number

    def _word(self, word: str, is_command: bool) -> Formula:
        if word in ("frac", "dfrac", "tfrac", "cfrac") and is_command:
            over = self._argument()
            under = self._argument()
            return lambda at: divide(over(at), under(at))
        if word == "sqrt":
            return self._root()
        if word in _FUNCTIONS:
            return self._function(word)
        if word in _CONSTANTS:
            constant = _CONSTANTS[word]
            return lambda at: constant
        return self._letters(word, is_command)

    def _letters(self, word: str, is_command: bool) -> Formula:
        """A Greek letter, or a product of up to three letters: longer words are words."""
        names = [word] if is_command and word in _GREEK else list(word)
        if not word or (is_command and word not in _GREEK) or len(names) > 3:
            raise NoFormulaError(word)
        if self._token == "_":
            self._take()
            names[-1] += "_" + self._take()
        variables = [name for name in names if name not in _CONSTANTS]
        self.letters.update(variables)
        return lambda at: _fold(multiply, [at[n] if n in at else _CONSTANTS[n] for n in names])

    def _argument(self) -> Formula:
        """What a LaTeX command takes: a group in braces or one digit or letter."""
        token = self._token
        if token.isdigit() and len(token) > 1:
            self._tokens[self._next : self._next + 1] = [token[0], token[1:]]
        if token == "{" or token.isalnum() or token.startswith("\\"):
            return self._atom()
        raise NoFormulaError(token)

    def _root(self) -> Formula:
        degree: Formula = lambda at: Fraction(2)  # noqa: E731
        if self._token == "[":
            degree = self._atom()
        inside = self._argument() if self._token != "(" else self._atom()
        return lambda at: power(inside(at), divide(Fraction(1), degree(at)))

    def _function(self, name: str) -> Formula:
        function = _FUNCTIONS[name]
        base: Formula | None = None
        exponent: Formula | None = None
        while self._token and self._token in "_^":
            if self._take() == "_":
                base = self._argument()
            else:
                exponent = self._exponent()
        argument = self._atom() if self._token in _OPENING else self._factors()

        def value(at: Letters) -> Value:
            result: Value = real_if_close(function(complex(argument(at))))
            if base is not None:
                result = divide(result, function(complex(base(at))))
            return result if exponent is None else power(result, exponent(at))

        if base is not None and name != "log":
            raise NoFormulaError(name)
        return value


def _negated(formula: Formula) -> Formula:
    return lambda at: -formula(at)


def _reciprocal(formula: Formula) -> Formula:
    return lambda at: divide(Fraction(1), formula(at))


def _applied(function: Callable[[Value], Value], formula: Formula) -> Formula:
    return lambda at: function(formula(at))


def _fold(operation: Callable[[Value, Value], Value], values: Sequence[Value]) -> Value:
    result = values[0]
    for value in values[1:]:
        result = operation(result, value)
    return result
