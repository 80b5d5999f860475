"""Whether two final answers say the same: numbers, formulas, lists, points, intervals, sets or words."""

import re
from collections.abc import Callable, Sequence

from svdconvert.evaluation.grading.expressions import parse, values_equal
from svdconvert.evaluation.grading.final_answer import LONGEST, matching_brace
from svdconvert.evaluation.grading.hendrycks import normalise

_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_COMMANDS = (
    "\\boxed",
    "\\fbox",
    "\\text",
    "\\textbf",
    "\\textrm",
    "\\mathrm",
    "\\mathbf",
    "\\mbox",
    "\\mathbb",
)
_SPACES = re.compile(r"\\[,;:! ]|~|\\q?quad(?![a-z])|\s+")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-z])\.?")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_UNIT = re.compile(r"(?<=[\d}) ])\s*\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?$")
_PLAIN_UNIT = re.compile(r"(?<=\d)\s+[A-Za-z][A-Za-z ]*$")
_NAMED = re.compile(
    r"(?:[A-Za-z]|\\[a-z]+|[a-z]\([a-z]\))(?:_\{?\w\}?)?\s*(?:=|\\in(?![a-z]))\s*(?P<rest>.+)", re.S
)
_MATRIX = re.compile(r"\\begin\{[pbBvV]?matrix\}(?P<cells>.*)\\end\{[pbBvV]?matrix\}", re.S)
_BRACKETS = {"(": ")]", "[": ")]"}
_OPEN = "([{"
_CLOSED = ")]}"
_MOST_PARTS = 50
_DEEPEST = 8


def same_answer(one: str, other: str) -> bool:
    """True if both texts state the same answer; a text that cannot be read is compared as it is."""
    if max(len(one), len(other)) > LONGEST:
        return False
    return _same(_peeled(one), _peeled(other), 0)


def _same(one: str, other: str, depth: int) -> bool:
    if _text(one) == _text(other):
        return True
    if depth > _DEEPEST or not one or not other:
        return False
    for compare in (_same_list, _same_matrix, _same_union, _same_bracketed, _same_equation):
        verdict = compare(one, other, depth + 1)
        if verdict is not None:
            return verdict
    return _same_value(one, other)


def _peeled(text: str) -> str:
    """The answer without dollar signs, boxes, fonts, units, a full stop, and the name of what it is."""
    text = text.strip()
    while True:
        before = text
        text = text.strip().rstrip(".").strip()
        for opening, closing in _WRAPPERS:
            if (
                len(text) > len(opening) + len(closing) - 1
                and text.startswith(opening)
                and text.endswith(closing)
            ):
                text = text[len(opening) : -len(closing)]
        text = _without_command(text)
        if text == before:
            break
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "")
    text = _SIZES.sub("", text.replace("{,}", ",").replace("\\!", ""))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\le(", "(")
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|°)|°|\\degree", "", text)
    text = _UNIT.sub("", text.strip())
    text = _PLAIN_UNIT.sub("", text)
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    named = _NAMED.fullmatch(text.strip())
    return (named["rest"] if named and "=" not in named["rest"] else text).strip()


def _without_command(text: str) -> str:
    """The content of a command that encloses all of the text, such as \\boxed{...} or \\text{...}."""
    for command in _COMMANDS:
        if text.startswith(command + "{") and matching_brace(text, len(command)) == len(text) - 1:
            return text[len(command) + 1 : -1]
    return text


def _text(text: str) -> str:
    """The form in which answers that are no formulas are compared."""
    try:
        text = normalise(text)
    except ValueError:
        text = text.replace("\\\\", "\\")
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}", r"\1", text)
    return _SPACES.sub("", text).casefold()


def _parts(text: str, separator: str = ",") -> list[str]:
    """`text` split at separators that are not inside brackets."""
    parts = [""]
    level = 0
    for mark in text:
        level += (mark in _OPEN) - (mark in _CLOSED)
        if mark == separator and level <= 0:
            parts.append("")
        else:
            parts[-1] += mark
    return [part.strip() for part in parts]


def _same_in_any_order(ones: Sequence[str], others: Sequence[str], depth: int) -> bool:
    if len(ones) != len(others) or len(ones) > _MOST_PARTS:
        return False
    left = list(others)
    for one in ones:
        match = next((other for other in left if _same(one, other, depth)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_list(one: str, other: str, depth: int) -> bool | None:
    """A list without brackets names several solutions, in any order; 1 \\pm x is such a list too."""
    lists = [_listed(text) for text in (one, other)]
    if max(map(len, lists)) == 1:
        return None
    return _same_in_any_order(lists[0], lists[1], depth)


def _listed(text: str) -> list[str]:
    text = re.sub(r",?\s*(?:\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)\s*", ",", text)
    listed: list[str] = []
    for part in _parts(text):
        if part.count("\\pm") == 1:
            listed += [part.replace("\\pm", "+"), part.replace("\\pm", "-")]
        else:
            listed.append(part)
    return listed


def _same_matrix(one: str, other: str, depth: int) -> bool | None:
    matrices = [_MATRIX.fullmatch(text) for text in (one, other)]
    if matrices[0] is None or matrices[1] is None:
        return None
    rows = [_rows(match["cells"]) for match in matrices if match]
    shapes = [[len(row) for row in matrix] for matrix in rows]
    cells = [[cell for row in matrix for cell in row] for matrix in rows]
    return shapes[0] == shapes[1] and all(_same(a, b, depth) for a, b in zip(cells[0], cells[1], strict=True))


def _rows(cells: str) -> list[list[str]]:
    lines = re.split(r"\\\\(?:\[[^\]]*\])?", cells)
    return [[cell.strip() for cell in line.split("&")] for line in lines if line.strip()]


def _same_union(one: str, other: str, depth: int) -> bool | None:
    """Intervals joined by \\cup, in any order."""
    unions = [[part.strip() for part in re.split(r"\\cup(?![a-z])|∪", text)] for text in (one, other)]
    return None if max(map(len, unions)) == 1 else _same_in_any_order(unions[0], unions[1], depth)


def _same_bracketed(one: str, other: str, depth: int) -> bool | None:
    """Points and intervals by element with the same brackets; sets in any order."""
    content = _content(one)
    other_content = _content(other)
    if content is None or other_content is None:
        return None
    brackets, parts = content
    other_brackets, other_parts = other_content
    if len(parts) == len(other_parts) == 1 and brackets != "{}":
        return None if brackets == other_brackets else False
    if brackets != other_brackets:
        return False
    if brackets == "{}":
        return _same_in_any_order(parts, other_parts, depth)
    return len(parts) == len(other_parts) and all(
        _same(a, b, depth) for a, b in zip(parts, other_parts, strict=True)
    )


def _content(text: str) -> tuple[str, list[str]] | None:
    """(brackets, parts) of a text that one pair of brackets encloses."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return "{}", _parts(text[2:-2])
    if len(text) < 2 or text[0] not in _BRACKETS or text[-1] not in _BRACKETS[text[0]]:
        return None
    level = 0
    for index, mark in enumerate(text):
        level += (mark in "([") - (mark in ")]")
        if level == 0 and index < len(text) - 1:
            return None
    return text[0] + text[-1], _parts(text[1:-1])


def _same_equation(one: str, other: str, depth: int) -> bool | None:
    """Equations side by side, also with the sides exchanged."""
    sides = [text.split("=") for text in (one, other)]
    if max(map(len, sides)) == 1:
        return None
    if len(sides[0]) != 2 or len(sides[1]) != 2:
        return False
    compare: Callable[[int, int], bool] = lambda a, b: _same(sides[0][a].strip(), sides[1][b].strip(), depth)  # noqa: E731
    return (compare(0, 0) and compare(1, 1)) or (compare(0, 1) and compare(1, 0))


def _same_value(one: str, other: str) -> bool:
    first = parse(one)
    second = parse(other)
    return first is not None and second is not None and values_equal(first, second)
