"""Numbers in answers, and the two grades of GSM8K.

The paper's grade reproduces the scripts of PiSSA, MiLoRA and SORSA (all derived from MetaMath's) with their
defects: a number is read up to its second comma, and rounded.
"""

import re
from fractions import Fraction
from math import inf, isfinite

from svdconvert.errors import brief
from svdconvert.evaluation.grading.final_answer import final_answer

MARKER = "The answer is: "
"""What MetaMath's solutions put before the answer, and the papers' scripts look for."""

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"{_WHOLE}(?:\.\d+)?|\.\d+"
# A mixed number such as 2 1/2, a fraction, or a decimal number, also with thousands; no part of a word.
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+\u2212]\s?)?\$?\s?"
    rf"(?:(?P<whole>\d+)\s+(?P<part>\d+/\d+)|(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})|(?P<decimal>{_DECIMAL}))"
    r"(?!\d)"
)
_LATEX_MARKS = re.compile(r"\\[!,;: ]|\{,\}|\\text\{[^}]*\}|\\%|[{}$\\*]")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_LONGEST_NUMBER = 400
_GOLD = re.compile(r"[-+]?[0-9,]{0,60}(?:\.[0-9]{0,60})?")
"""An exponent is not accepted: 1e9999999 has ten million digits."""
_PAPER_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")


def exact_number(text: str) -> Fraction | None:
    """The one number that `text` states; None if there is none, or if there are several different ones.

    "1,450,000", "$72.50", "12 %", "3/4", "2 1/2" and "6 x 3 = 18" (18) are understood.
    """
    text = _LATEX_FRACTION.sub(r" \1/\2", text)
    text = _LATEX_MARKS.sub("", text).rpartition("=")[2][:_LONGEST_NUMBER]
    found = {_value(match) for match in _NUMBER.finditer(text)}
    return found.pop() if len(found) == 1 else None


def _value(match: re.Match[str]) -> Fraction | None:
    parts = {name: text.replace(",", "") for name, text in match.groupdict().items() if text is not None}
    try:
        if "whole" in parts:
            value = Fraction(parts["whole"]) + Fraction(parts["part"])
        elif "over" in parts:
            value = Fraction(parts["over"]) / Fraction(parts["under"])
        else:
            value = Fraction(parts["decimal"])
    except ZeroDivisionError:
        return None
    return value if parts.get("sign", "+").strip() == "+" else -value


def gsm8k_gold(answer: str) -> Fraction:
    """The number behind "####" in a solution of the data set. Raises ValueError if there is none."""
    text = answer.rpartition("####")[2].strip()
    if not (_GOLD.fullmatch(text) and any(letter.isdigit() for letter in text)):
        raise ValueError(f"its answer does not end in #### and a number, but in {brief(text)}")
    return Fraction(text.replace(",", ""))


def strict_gsm8k(answer: str, gold: Fraction) -> tuple[bool, str | None]:
    """(right, the final answer that was found): the numbers are equal exactly."""
    stated = final_answer(answer)
    return stated is not None and exact_number(stated) == gold, stated


def paper_gsm8k(answer: str, gold: Fraction) -> tuple[bool, str | None]:
    """(right, the number that was found) as the papers' scripts decide it."""
    number = paper_number(answer)
    return number is not None and float(number) == float(gold), None if number is None else str(number)


def paper_number(answer: str) -> int | None:
    """The number behind the last "The answer is: ", rounded, and cut at its second comma."""
    before, marker, behind = answer.rpartition(MARKER)
    match = _PAPER_NUMBER.search(behind.strip()) if marker else None
    if match is None:
        return None
    number = match[0]
    if "/" in number:
        return _paper_fraction(number)
    value = float(number.replace(",", ""))
    return round(value) if isfinite(value) else None


def _paper_fraction(number: str) -> int | None:
    over, _, under = number.partition("/")
    if not over.lstrip("+-"):
        return None
    if under == "0":
        value = float(over)
        return round(value) if abs(value) < inf else None
    try:
        return round(float(Fraction(f"{over}/{under}")))
    except (ZeroDivisionError, OverflowError):
        return None
