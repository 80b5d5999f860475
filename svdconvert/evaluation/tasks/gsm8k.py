"""GSM8K: word problems of grade-school mathematics, whose answer is one number (arXiv:2110.14168).

Prompt, limit and the grade `paper` are those of PiSSA, MiLoRA and SORSA, whose scripts agree.
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from svdconvert.errors import DataError, brief
from svdconvert.evaluation.base import DataSource, Grade, Limits, Protocol, Record, Row, Runner, Task
from svdconvert.training.data.prompts import ALPACA

MARKER = "The answer is: "
_GOLD = "#### "
_STEPS = " Let's think step by step."

# The published scripts' pattern, which ends at the second comma of 1,450,000.
_PAPER_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")

_GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)"
_NUMBER = rf"[-+]?\s?\$?\s?(?:(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+)"
# A number and, behind it, a denominator or the fraction of a mixed number.
_STRICT_NUMBER = re.compile(rf"(?<![\w.])({_NUMBER})(?:\s?/\s?(\d+)|\s+(\d+)/(\d+))?")
_MARKERS = re.compile(r"the answer is:?|####", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_LONGEST = 100  # characters of a number; more digits are no answer


def gold_number(answer: str) -> str:
    """What stands behind #### in the data set's solution, without commas."""
    return answer.rpartition(_GOLD)[2].replace(",", "").strip()


def rows(records: Sequence[Record]) -> list[Row]:
    """A row for each record with `question` and `answer`."""
    found = []
    for number, record in enumerate(records, start=1):
        question = record.get("question")
        answer = record.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or _GOLD not in answer:
            raise DataError(
                f"row {number}: GSM8K has a question and an answer that ends in '#### NUMBER', not "
                f"{brief(dict(record))}"
            )
        gold = gold_number(answer)
        if _number(gold) is None:
            raise DataError(f"row {number}: {brief(gold)} behind #### is no number")
        found.append(Row(id=str(number), prompt=ALPACA.replace("{prompt}", question) + _STEPS, gold=gold))
    return found


def grade(row: Row, answer: str, protocol: Protocol, runner: Runner | None = None) -> Grade:
    """Compare the number that the answer ends in with the right one."""
    return _strict(row, answer) if protocol == "strict" else _paper(row, answer)


def _strict(row: Row, answer: str) -> Grade:
    """The number behind the last marker (The answer is, ####, or in a box), read as a whole and exactly."""
    match = _final_number(_marked(answer) or "")
    value = _value(match) if match else None
    if match is None or value is None:
        return Grade(correct=False, answered=False)
    return Grade(value == _number(str(row.gold)), answered=True, extracted=match[0].strip())


def _final_number(text: str) -> re.Match[str] | None:
    """The first number of a text; of an equation, the last side that is a single number."""
    sides = [list(_STRICT_NUMBER.finditer(side)) for side in text.split("=")]
    single = [found[0] for found in sides if len(found) == 1]
    if len(sides) > 1 and single:
        return single[-1]
    return next((match for found in sides for match in found), None)


def _marked(answer: str) -> str | None:
    """The line behind the last marker, or the last box if that comes later; None without either."""
    markers = list(_MARKERS.finditer(answer))
    boxes = list(_BOXED.finditer(answer))
    if boxes and (not markers or boxes[-1].start() > markers[-1].start()):
        return boxes[-1][1]
    if not markers:
        return None
    text = answer[markers[-1].end() :].lstrip()
    return text.split("\n", 1)[0]


def _value(match: re.Match[str]) -> Decimal | None:
    """The exact number that `_STRICT_NUMBER` found; None if it is divided by zero."""
    value = _number(match[1])
    whole = Decimal(0) if match[3] is None or value is None else value
    above = value if match[3] is None else _number(match[3])
    below = _number(match[2] or match[4] or "1")
    if value is None or above is None or not below:
        return None
    return whole + (-above if whole < 0 else above) / below


def _number(text: str) -> Decimal | None:
    """A number with commas, a dollar sign or a plus, exactly; None for anything else."""
    plain = re.sub(r"[,$\s]", "", text)
    if len(plain) > _LONGEST:
        return None
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _paper(row: Row, answer: str) -> Grade:
    """As the published scripts: the first number behind the last marker, rounded to a whole number."""
    if MARKER not in answer:
        return Grade(correct=False, answered=False)
    match = _PAPER_NUMBER.search(answer.rpartition(MARKER)[2].strip())
    if match is None or len(match[0]) > _LONGEST:
        return Grade(correct=False, answered=False)
    value = _paper_value(match[0])
    if value is None:
        return Grade(correct=False, answered=False, extracted=match[0])
    return Grade(float(round(value)) == float(row.gold), answered=True, extracted=match[0])


def _paper_value(text: str) -> float | None:
    """A fraction, whose denominator 0 counts as 1, or a number without its commas."""
    above, slash, below = text.partition("/")
    try:
        if not slash:
            return float(text.replace(",", ""))
        return float(above) if below == "0" else float(above) / float(below)
    except (ValueError, ZeroDivisionError):
        return None


TASK = Task(
    name="gsm8k",
    summary="Grade-school word problems; the answer is a number",
    version=1,
    data=DataSource(name="openai/gsm8k", configs=("main",), split="test"),
    rows=rows,
    grade=grade,
    limits={"strict": Limits(max_new_tokens=1024), "paper": Limits(max_new_tokens=1024)},
    paper="PiSSA, MiLoRA and SORSA: zero-shot, greedy, 1024 new tokens",
)
