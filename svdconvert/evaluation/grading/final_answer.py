"""Find the final answer in a worked solution, for the strict grades."""

import re

_ANSWER_IS = re.compile(r"\bthe (?:final )?answer is\s*:", re.IGNORECASE)
_IN_PASSING = re.compile(r"\bthe (?:final )?answer is\b", re.IGNORECASE)
_BOXES = ("\\boxed", "\\fbox")
_END_OF_SENTENCE = re.compile(r"\.(?=\s|$)")
LONGEST = 2000
"""Characters of a final answer; what is longer is cut."""


def final_answer(text: str) -> str | None:
    """What the text states last as its answer, behind "The answer is:", behind "####" or in \\boxed{}.

    "The answer is" without a colon counts if there is none of these. None if there is no such mark, or
    nothing behind it.
    """
    start, answer = _last_statement(text, _ANSWER_IS)
    hashes = text.rfind("####")
    if hashes > start:
        start = hashes
        answer = _statement(text[hashes + len("####") :])
    if max(text.rfind(box) for box in _BOXES) > start:
        answer = last_boxed(text) or answer
    if answer is None:
        answer = _last_statement(text, _IN_PASSING)[1]
    return answer[:LONGEST].strip() or None if answer else None


def _last_statement(text: str, mark: re.Pattern[str]) -> tuple[int, str | None]:
    """(where the last `mark` is, or -1; the statement behind it)."""
    found = list(mark.finditer(text))
    return (found[-1].start(), _statement(text[found[-1].end() :])) if found else (-1, None)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} or \\fbox{...}; None if there is none or it is open."""
    start = max(text.rfind(box) for box in _BOXES)
    if start < 0:
        return None
    opening = text.find("{", start)
    after = text[start:].split("d", 1)[-1] if opening < 0 else ""
    if opening < 0:
        # \boxed 5: one token without braces.
        word = re.match(r"\s+(\S+?)[.$]*(?:\s|$)", after)
        return word[1] if word else None
    end = matching_brace(text, opening)
    return None if end is None else text[opening + 1 : end]


def matching_brace(text: str, opening: int) -> int | None:
    """The index of the brace that closes the one at `opening`; None if none does."""
    level = 0
    for index in range(opening, len(text)):
        level += {"{": 1, "}": -1}.get(text[index], 0)
        if level == 0:
            return index
    return None


def _statement(text: str) -> str:
    """The beginning of `text` that is one answer: a formula, or the rest of the sentence or line."""
    text = text.lstrip(" \t:\n")
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening):
            end = _closing(text, opening, closing)
            if end is not None:
                return text[len(opening) : end]
    if text.startswith("\\begin{"):
        # A matrix may take several lines.
        end = text.find("\\end{")
        return text if end < 0 else text[: text.find("}", end) + 1]
    line = text.partition("\n")[0]
    return _END_OF_SENTENCE.split(line, maxsplit=1)[0]


def _closing(text: str, opening: str, closing: str) -> int | None:
    """The index at which the formula that begins `text` ends; None for a dollar sign of a currency."""
    end = text.find(closing, len(opening))
    while end > 0 and text[end - 1] == "\\" and closing.startswith("$"):
        end = text.find(closing, end + 1)
    if end < 0 or "\n\n" in text[:end]:
        return None
    inside = text[len(opening) : end]
    is_currency = opening == "$" and re.match(r"\d[\d,.]*\s+[A-Za-z(]", inside) is not None
    return None if is_currency else end
