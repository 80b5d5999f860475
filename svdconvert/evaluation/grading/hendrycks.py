"""The normaliser of answers that came with MATH, as the papers' scripts use it, defects included.

It is written anew from the published behaviour (https://github.com/hendrycks/math, math_equivalence.py), and
raises ValueError in the cases in which the original raises any error.
"""

import re

_REMOVED = ("\n", "\\!")
_REPLACED = (
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_UNIT = "\\text{ "


def normalise(text: str) -> str:
    """`text` in the form in which two answers are compared as strings.

    Raises ValueError for a text in which the original raises an error, such as "x/y" or "\\frac".
    """
    for mark in _REMOVED:
        text = text.replace(mark, "")
    for mark, other in _REPLACED:
        text = text.replace(mark, other)
    text = _without_unit(text).replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text.startswith("."):
        text = "0" + text
    left, *rest = text.split("=")
    if len(rest) == 1 and len(left) <= 2:
        text = rest[0]
    text = _with_braced_fractions(_with_braced_roots(text).replace(" ", ""))
    return _with_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    if text.count(_UNIT) > 1:
        raise ValueError("two units")
    return text.partition(_UNIT)[0]


def _with_braced_roots(text: str) -> str:
    """\\sqrt3 becomes \\sqrt{3}."""
    first, *roots = text.split("\\sqrt")
    if "" in roots:
        raise ValueError("a root of nothing")
    return first + "".join(
        f"\\sqrt{root}" if root[0] == "{" else f"\\sqrt{{{root[0]}}}{root[1:]}" for root in roots
    )


def _with_braced_fractions(text: str) -> str:
    """\\frac12 becomes \\frac{1}{2}, and \\frac1{72} becomes \\frac{1}{72}; \\frac{72}1 remains."""
    first, *fractions = text.split("\\frac")
    done = first
    for part in fractions:
        if not part:
            raise ValueError("a fraction of nothing")
        if part[0] == "{":
            done += f"\\frac{part}"
        elif len(part) < 2:
            return text
        else:
            under = part[1] if part[1] == "{" else f"{{{part[1]}}}"
            done += f"\\frac{{{part[0]}}}{under}{part[2:]}"
    return done


def _with_fraction(text: str) -> str:
    """3/4 becomes \\frac{3}{4}."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    over, under = (_python_integer(part) for part in parts)
    return f"\\frac{{{over}}}{{{under}}}" if text == f"{over}/{under}" else text


def _python_integer(text: str) -> int:
    if len(text) > 4000 or not re.fullmatch(r"\s*[-+]?\d+(?:_\d+)*\s*", text):
        raise ValueError("no integer")
    return int(text)
