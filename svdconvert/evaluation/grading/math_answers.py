"""The grades of MATH: `strict`, and those of the papers' scripts with their defects.

The paper's grade of SORSA and MiLoRA (`paper`) takes numbers for equal up to a factor of 100, ignores
brackets, and takes an answer that its normaliser cannot read for right. PiSSA's (`paper-pissa`) compares
strings, so that an answer in dollar signs is never right.
"""

from math import isclose

from svdconvert.evaluation.grading.answer_forms import same_answer
from svdconvert.evaluation.grading.expressions import parse, values_equal
from svdconvert.evaluation.grading.final_answer import final_answer, last_boxed
from svdconvert.evaluation.grading.hendrycks import normalise
from svdconvert.evaluation.grading.numbers import MARKER

_SYMBOLIC = 1e-3
_NUMERIC = 1e-4


def math_gold(solution: str) -> str:
    """The answer in a solution of the data set. Raises ValueError if it has no \\boxed{}."""
    boxed = last_boxed(solution)
    if boxed is None:
        raise ValueError("its solution has no answer in \\boxed{}")
    return boxed


def strict_math(answer: str, gold: str) -> tuple[bool, str | None]:
    """(right, the final answer that was found): both state the same value, set, point, interval or word."""
    stated = final_answer(answer)
    return stated is not None and same_answer(stated, gold), stated


def paper_math(answer: str, gold: str) -> tuple[bool, str | None]:
    """(right, the part that was compared) as the scripts of SORSA and MiLoRA decide it."""
    stated = paper_answer(answer)
    # The scripts compare an answer that is missing as the word None.
    compared = "None" if stated is None else stated
    try:
        one = normalise(gold)
        other = normalise(compared)
    except ValueError:
        # The gold answer is compared with itself here.
        return bool(gold) or gold == compared, stated
    return _loosely_equal(one, other) or one == other, stated


def paper_math_pissa(answer: str, gold: str) -> tuple[bool, str | None]:
    """(right, the part that was compared) as PiSSA's script decides it: equal strings."""
    stated = paper_answer(answer)
    if stated is None:
        return False, None
    try:
        return normalise(stated) == normalise(gold), stated
    except ValueError:
        return stated == gold, stated


def paper_answer(answer: str) -> str | None:
    """The text behind the last "The answer is: " up to a full stop at the end of a line."""
    _, marker, behind = answer.rpartition(MARKER)
    if not marker:
        return None
    return behind.partition(".\n")[0].strip().removesuffix(".").strip()


def _python_float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _loosely_equal(one: str, other: str) -> bool:
    """Equality as the scripts' `math_equal` decides it."""
    number = _python_float(one)
    reference = _python_float(other)
    if number is not None and reference is not None:
        return any(
            isclose(value, number, rel_tol=_NUMERIC)
            for value in (reference / 100, reference, reference * 100)
        )
    if not one:
        return False
    one = one.strip()
    other = other.strip()
    if _without_brackets(one, other) == _without_brackets(other, one, first=False):
        return True
    if _equal_by_element(one, other):
        return True
    return _same_expression(one, other)


def _without_brackets(text: str, against: str, *, first: bool = True) -> str:
    """`text` without braces and round brackets; without square ones too if they enclose the first text."""
    one = text if first else against
    other = against if first else text
    encloses = (_in(one, "[]") and not other.startswith("(")) or (
        _in(one, "()") and not other.startswith("[")
    )
    if encloses:
        text = text.strip("[]()")
    return text.translate({ord(mark): None for mark in "{}()"})


def _in(text: str, brackets: str) -> bool:
    return text.startswith(brackets[0]) and text.endswith(brackets[1])


def _equal_by_element(one: str, other: str) -> bool:
    if not any(_in(one, brackets) and _in(other, brackets) for brackets in ("[]", "()")):
        return False
    parts = one[1:-1].split(",")
    others = other[1:-1].split(",")
    return len(parts) == len(others) and all(map(_loosely_equal, parts, others))


def _same_expression(one: str, other: str) -> bool:
    """Equal as formulas, or as constants up to one part in a thousand.

    The scripts ask sympy, whose parser runs the text as Python; equal values at several points are asked
    for here instead.
    """
    first = parse(one, mixed_numbers=False)
    second = parse(other, mixed_numbers=False)
    if first is None or second is None:
        return False
    if values_equal(first, second):
        return True
    if first.letters or second.letters:
        return False
    values = [expression.at({}) for expression in (first, second)]
    try:
        numbers = [complex(value) for value in values if value is not None]
    except OverflowError:
        return False
    if len(numbers) < 2 or any(number.imag for number in numbers):
        return False
    return isclose(numbers[0].real, numbers[1].real, rel_tol=_SYMBOLIC)
