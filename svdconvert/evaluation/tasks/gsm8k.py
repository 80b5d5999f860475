"""GSM8K: word problems of grade-school mathematics, whose answer is one number (arXiv:2110.14168).

Prompt, limit and the grade `paper` are those of PiSSA, MiLoRA and SORSA, whose scripts agree.
"""

from collections.abc import Sequence
from fractions import Fraction

from svdconvert.evaluation.base import DataSource, Grade, Limits, Protocol, Record, Row, Runner, Task
from svdconvert.evaluation.grading.numbers import gsm8k_gold, paper_gsm8k, strict_gsm8k
from svdconvert.evaluation.records import read_each, text_of
from svdconvert.training.data.prompts import ALPACA

_STEPS = " Let's think step by step."


def _row(number: int, record: Record) -> Row:
    gold = gsm8k_gold(text_of(record, "answer"))
    prompt = ALPACA.replace("{prompt}", text_of(record, "question")) + _STEPS
    return Row(id=str(number + 1), prompt=prompt, gold=str(gold))


def _rows(records: Sequence[Record]) -> list[Row]:
    return read_each(records, _row)


def _grade(row: Row, answer: str, protocol: Protocol, runner: Runner | None) -> Grade:
    decide = strict_gsm8k if protocol == "strict" else paper_gsm8k
    correct, extracted = decide(answer, Fraction(row.gold))
    return Grade(correct, extracted is not None, extracted)


TASK = Task(
    name="gsm8k",
    summary="1,319 word problems of grade-school mathematics; the answer is a number",
    version=1,
    data=DataSource(
        name="openai/gsm8k", configs=("main",), revision="740312add88f781978c0658806c59bc2815b9866"
    ),
    rows=_rows,
    grade=_grade,
    limits={"strict": Limits(max_new_tokens=1024), "paper": Limits(max_new_tokens=1024)},
    paper="PiSSA, MiLoRA and SORSA: zero-shot, greedy, 1,024 new tokens",
)
