"""Arithmetic: sums of a few numbers, whose answer is one whole number. A small task that shows learning.

The rows are those of svdconvert/recipes/arithmetic, made by reasoning-gym's chain_sum. The grade depends on
no format: the last number of an answer counts, so a model that was never shown how to answer loses nothing.
"""

import re
from collections.abc import Sequence

from svdconvert.config.recipe_files import PACKAGED
from svdconvert.errors import DataError, brief
from svdconvert.evaluation.base import DataSource, Grade, Limits, Protocol, Record, Row, Runner, Task

_GOLD = re.compile(r"#### (-?\d{1,30})\s*$")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_LONGEST = 40  # characters of a number; more digits are no answer


def rows(records: Sequence[Record]) -> list[Row]:
    """A row for each record with `question`, and `answer` that ends in #### and the number."""
    found = []
    for number, record in enumerate(records, start=1):
        question = record.get("question")
        match = _GOLD.search(str(record.get("answer")))
        if not isinstance(question, str) or match is None:
            raise DataError(
                f"row {number}: arithmetic has a question and an answer that ends in '#### NUMBER', not "
                f"{brief(dict(record))}"
            )
        found.append(Row(id=str(number), prompt=f"{question}\n", gold=match[1]))
    return found


def grade(row: Row, answer: str, protocol: Protocol, runner: Runner | None = None) -> Grade:
    """Compare the last number of the answer with the right one; both protocols do."""
    numbers = _NUMBER.findall(answer)
    if not numbers or len(numbers[-1]) > _LONGEST:
        return Grade(correct=False, answered=False)
    last = numbers[-1]
    whole, _, decimals = last.replace(",", "").partition(".")
    return Grade(int(whole) == int(row.gold) and not decimals.strip("0"), answered=True, extracted=last)


_LIMITS = Limits(max_new_tokens=96)

TASK = Task(
    name="arithmetic",
    summary="Sums of a few numbers; the answer is its last number",
    version=1,
    data=DataSource(name=str(PACKAGED / "arithmetic" / "heldout.jsonl"), split="train"),
    rows=rows,
    grade=grade,
    limits={"strict": _LIMITS, "paper": _LIMITS},
)
