"""MATH: what counts as the same answer, strictly and as the papers' scripts decide it."""

from fractions import Fraction

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.parsing.sympy_parser import implicit_multiplication, parse_expr, standard_transformations

from svdconvert.evaluation.grading.expressions import parse, values_equal
from svdconvert.evaluation.grading.hendrycks import normalise
from svdconvert.evaluation.grading.math_answers import math_gold, paper_math, paper_math_pissa, strict_math

# Answers of all kinds that occur in the data set.
GOLDS = (
    "2",
    "-\\frac{7}{9}",
    "\\dfrac{3}{13}",
    "10,000",
    "\\$15,\\!000",
    "33\\%",
    "3\\sqrt{3}",
    "\\frac{1+\\sqrt{2}}{2}",
    "6\\frac{1}{5}",
    "2x^{10}+2x^8",
    "(a+5)(b+2)",
    "1+2i",
    "(-\\infty,-7)\\cup(1,2)",
    "\\left(\\frac{3}{5},\\frac{8}{3}\\right]",
    "1\\pm\\sqrt{19}",
    "24,-3",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
    "\\{1,2,3\\}",
    "\\text{Evelyn}",
    "\\text{(C)}",
    "x \\in [-2,7]",
    "4x-5y=-50",
    "30^\\circ",
    "15\\mbox{ cm}^2",
    "\\cos 13^\\circ",
    "2516_8",
    "1.5",
)
WRAPPINGS = (
    "So.\nThe answer is: {}",
    "The answer is: {}.",
    "The answer is: ${}$",
    "Thus $\\boxed{{{}}}$.",
    "x\n#### {}",
)


@pytest.mark.parametrize("gold", GOLDS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_strict_accepts_the_right_answer_in_every_wrapping_and_no_other(gold: str, wrapping: str) -> None:
    assert strict_math(wrapping.format(gold), gold)[0]
    assert not [other for other in GOLDS if other != gold and strict_math(wrapping.format(other), gold)[0]]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "\\frac12"),
        ("\\frac{\\sqrt{8}}{2}", "\\sqrt{2}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("2, 3", "3,2"),
        ("1+\\sqrt{2}, 1-\\sqrt{2}", "1 \\pm \\sqrt{2}"),
        ("31/5", "6\\frac{1}{5}"),
        ("\\left( \\frac{1}{2}, 3 \\right)", "(0.5,3)"),
        ("[0, \\infty)", "[0,\\infty)"),
        ("(1,2) \\cup (-\\infty,-7)", "(-\\infty,-7)\\cup(1,2)"),
        ("x = 5", "5"),
        ("-50 = 4x-5y", "4x-5y=-50"),
        ("C", "\\text{C}"),
        ("ellipse", "\\text{ellipse}"),
        ("10 inches", "10\\text{ inches}"),
        ("1000000", "1,\\!000,\\!000"),
        ("2^{10}", "1024"),
        ("\\{3, 1\\}", "\\{1,3\\}"),
        ("\\begin{bmatrix}1\\\\ 0.5\\end{bmatrix}", "\\begin{pmatrix} 1 \\\\ \\frac{1}{2} \\end{pmatrix}"),
    ],
)
def test_strict_accepts_other_forms_of_the_same_answer(answer: str, gold: str) -> None:
    assert strict_math(f"The answer is: {answer}", gold)[0]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("0.05", "5"),
        ("500", "5"),
        ("(1,2)", "[1,2]"),
        ("(2,1)", "(1,2)"),
        ("1,2,2", "1,2"),
        ("\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
        ("x/y", "3"),
        ("\\frac", "7"),
        ("east", "seat"),
        ("2.0001", "2"),
        ("1/0", "1"),
        ("", "5"),
        ("None", "5"),
        ("\\sqrt{10000000001}", "100000"),
    ],
)
def test_strict_refuses_what_is_not_the_same(answer: str, gold: str) -> None:
    assert not strict_math(f"The answer is: {answer}", gold)[0]


def test_the_published_grades_have_their_known_defects() -> None:
    def sorsa(answer: str, gold: str) -> bool:
        return paper_math(f"The answer is: {answer}", gold)[0]

    def pissa(answer: str, gold: str) -> bool:
        return paper_math_pissa(f"The answer is: {answer}", gold)[0]

    assert sorsa("5", "500") and sorsa("0.05", "5") and not pissa("5", "500")
    assert sorsa("x/y", "3") and sorsa("\\frac", "7") and not pissa("x/y", "3")
    assert sorsa("(1,2)", "[1,2]") is False and sorsa("{1}", "1")
    assert sorsa("3.1416", "\\pi") and not strict_math("The answer is: 3.1416", "\\pi")[0]
    assert not sorsa("$5$", "5") and not pissa("$5$", "5")
    assert pissa("x=5", "5") and pissa("1/2", "\\frac12") and pissa("0.5", "\\frac{1}{2}")
    assert not pissa("\\frac{\\sqrt{8}}{2}", "\\sqrt{2}") and sorsa("\\frac{\\sqrt{8}}{2}", "\\sqrt{2}")
    assert paper_math("no answer", "5") == (False, None) and paper_math_pissa("no answer", "5") == (
        False,
        None,
    )


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("\\tfrac12", "\\frac{1}{2}"),
        ("\\frac1{72}", "\\frac{1}{72}"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("x = 2", "2"),
        ("abc = 2", "abc=2"),
        ("3/4", "\\frac{3}{4}"),
        ("03/4", "03/4"),
        (".5", "\\frac{1}{2}"),
        ("5\\text{ cm}", "5"),
        ("30^{\\circ}", "30"),
        ("50\\%", "50"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("", ""),
    ],
)
def test_the_normaliser_works_as_published(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize("text", ["x/y", "\\frac", "\\sqrt", "1\\text{ a}\\text{ b}", "\\frac{1}{2}/3"])
def test_the_normaliser_fails_where_the_published_one_does(text: str) -> None:
    with pytest.raises(ValueError):
        normalise(text)


def test_the_gold_answer_is_in_the_last_box() -> None:
    assert math_gold("$\\boxed{1}$ and $\\boxed{\\frac{1}{2}}$.") == "\\frac{1}{2}"
    with pytest.raises(ValueError, match="boxed"):
        math_gold("no box")


LEAVES = st.sampled_from(["x", "y", "2", "7", "(x+1)", "(3-y)"])
FORMULAS = st.recursive(
    LEAVES,
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(
        lambda t: f"({''.join(t)})"
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=30)
@given(FORMULAS, FORMULAS)
def test_formulas_are_equal_if_sympy_proves_it(one: str, other: str) -> None:
    """sympy is an independent oracle; its parser, which runs Python, is safe for these texts."""
    transformations = (*standard_transformations, implicit_multiplication)
    first, second = (parse_expr(text, transformations=transformations) for text in (one, other))
    ours = [parse(text) for text in (one, other)]
    assert ours[0] is not None and ours[1] is not None
    if first.is_finite is False or first.has(sympy.zoo, sympy.nan) or second.has(sympy.zoo, sympy.nan):
        assert not values_equal(ours[0], ours[1])
    else:
        assert values_equal(ours[0], ours[1]) == (sympy.simplify(first - second) == 0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2^{3}", 8),
        ("-2^2", -4),
        ("2^{-1}", Fraction(1, 2)),
        ("\\frac12", Fraction(1, 2)),
        ("\\frac{72}1", 72),
        ("\\sqrt{\\frac{9}{4}}", Fraction(3, 2)),
        ("5!", 120),
        ("|{-3}|", 3),
        ("3(4)", 12),
        ("6/2*3", 9),
        ("2\\cdot 3", 6),
        ("2\\frac{1}{3}", Fraction(7, 3)),
        ("1.25", Fraction(5, 4)),
    ],
)
def test_values_are_exact(text: str, value: Fraction) -> None:
    formula = parse(text)
    assert formula is not None and formula.at({}) == value


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9}}}",
        "9**9**9**9",
        "(((9!)!)!)!",
        "(" * 400,
        "2^" * 240 + "2",
        "\\sqrt" * 90 + "2",
        "\\sin" * 110 + " 1",
        "-" * 499 + "1",
        "{" * 200 + "1" + "}" * 200,
        "1" * 500 + "^" + "9" * 500,
        "__import__('os').system('true')",
        "\\frac{1}{0}",
        "[" * 1000 + "1,2" + "]" * 1000,
        "\\{" + "\\{1,2\\}," * 200 + "\\}",
        "1,2," * 400,
        "\ud800",
    ],
)
def test_hostile_answers_are_wrong_and_their_grading_ends(text: str) -> None:
    for gold in ("5", "\\frac{1}{2}", text[:50]):
        answer = f"The answer is: {text}"
        if gold == "5":
            assert not strict_math(answer, gold)[0]
        strict_math(answer, gold)
        paper_math(answer, gold)
        paper_math_pissa(answer, gold)


TOKENS = st.sampled_from(
    ["\\frac", "\\sqrt", "\\sin", "\\pm", "\\cup", "\\text{a}", "\\{", "\\}", "\\\\", "&", "$", "%", "_"]
    + [*"{}()[]^!|+-*/=,. \n1x"]
    + [
        "0.5",
        "\\pi",
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "\\boxed{",
        "####",
        "The answer is: ",
        "\ud800",
        "\u00b2",
    ]
)
TEXTS = st.lists(TOKENS, max_size=30).map("".join)


@given(TEXTS, TEXTS)
def test_no_answer_is_too_odd_to_be_graded(text: str, gold: str) -> None:
    for answer in (text, f"The answer is: {text}"):
        for grade in (strict_math, paper_math, paper_math_pissa):
            grade(answer, gold)
