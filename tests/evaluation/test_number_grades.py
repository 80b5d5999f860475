"""GSM8K: what the strict grade and the published one take for the answer."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdconvert.evaluation.grading.final_answer import final_answer
from svdconvert.evaluation.grading.numbers import (
    exact_number,
    gsm8k_gold,
    paper_gsm8k,
    paper_number,
    strict_gsm8k,
)

WRAPPINGS = (
    "Adding up.\nThe answer is: {}",
    "The answer is: {}.",
    "The answer is: {}.\n\n### Instruction:\nNext question",
    "the answer is ${}$. I hope it is correct.",
    "So she has \\boxed{{{}}} dollars.",
    "Work.\n#### {}",
    "The answer is: ${}",
    "The answer is: {} apples",
    "The answer is: 3 x 5 = {}",
)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@given(number=st.integers(-(10**12), 10**12), thousands=st.booleans())
def test_strict_accepts_every_whole_number_in_every_wrapping(
    wrapping: str, number: int, thousands: bool
) -> None:
    text = wrapping.format(f"{number:,}" if thousands else number)
    assert strict_gsm8k(text, Fraction(number))[0]
    assert not strict_gsm8k(text, Fraction(number + 1))[0]


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_strict_does_not_round(number: int, part: int) -> None:
    value = Fraction(number) + Fraction(part, 10**4 + 1)
    text = f"The answer is: {value.numerator}/{value.denominator}"
    assert strict_gsm8k(text, value)[0]
    assert not strict_gsm8k(text, Fraction(round(value)))[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,450,000.50", Fraction(2900001, 2)),
        ("12 %", Fraction(12)),
        ("3/4 of a mile", Fraction(3, 4)),
        ("2 1/2", Fraction(5, 2)),
        ("\\frac{1}{2}", Fraction(1, 2)),
        ("-$5", Fraction(-5)),
        ("**72**", Fraction(72)),
        ("1/0", None),
        ("3 apples and 4", None),
        ("none", None),
        ("x2", None),
        ("1,23", None),
    ],
)
def test_a_number_is_read_whole_or_not_at_all(text: str, value: Fraction | None) -> None:
    assert exact_number(text) == value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is: 5\nThe answer is: 6", "6"),
        ("#### 5\nThe answer is: 6", "6"),
        ("The answer is: 6\n#### 5", "5"),
        ("The answer is: $x^2$ because of 3.", "x^2"),
        ("The answer is: \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{7}, as the answer is positive.", "7"),
        ("The answer is: $72 per day and more", "$72 per day and more"),
        ("The answer is: \\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}\nDone", None),
        ("72", None),
        ("The answer is:", None),
        ("\\boxed{5", None),
    ],
)
def test_the_final_answer_is_what_stands_behind_the_last_mark(text: str, found: str | None) -> None:
    expected = "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}" if "pmatrix" in text else found
    assert final_answer(text) == expected


def test_the_published_grade_has_its_known_defects() -> None:
    assert paper_number("The answer is: 1,450,000") == 1450
    assert paper_number("The answer is: 72.5") == 72
    assert paper_number("The answer is: 0.5") == 0
    assert paper_number("The answer is: 3/4") == 1
    assert paper_number("The answer is: 7/0") == 7
    assert paper_number("The answer is: 3 apples and 4") == 3
    assert paper_number("The answer is:72") is None
    assert paper_number("#### 72") is None
    assert paper_number("The answer is: " + "9" * 400) is None
    assert paper_gsm8k("The answer is: 71.5", Fraction(72)) == (True, "72")


@given(st.text(max_size=200))
def test_no_text_is_too_odd_to_be_graded(text: str) -> None:
    for answer in (text, f"The answer is: {text}", f"\\boxed{{{text}", f"The answer is: 1/{text}"):
        strict_gsm8k(answer, Fraction(1))
        paper_gsm8k(answer, Fraction(1))


def test_the_gold_answer_stands_behind_the_last_mark() -> None:
    assert gsm8k_gold("2 + 2 = <<2+2=4>>4\n#### 1,004") == 1004
    with pytest.raises(ValueError):
        gsm8k_gold("no number")


@pytest.mark.parametrize(
    "text", ["three", "", "-", ",", ".", "1e999999999", "1/0", "nan", "inf", "1" * 70, "\u0663"]
)
def test_what_is_no_number_is_no_gold(text: str) -> None:
    with pytest.raises(ValueError, match=r"does not end in #### and a number"):
        gsm8k_gold(f"work #### {text}")


@pytest.mark.parametrize(
    ("text", "number"), [("-3", -3), ("1,004.50", 1004.5), (".5", 0.5), ("7.", 7), ("+2", 2)]
)
def test_a_gold_may_have_a_sign_thousands_and_decimals(text: str, number: float) -> None:
    assert gsm8k_gold(f"#### {text}") == number
