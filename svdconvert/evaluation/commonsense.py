"""What the eight commonsense tasks share: LLM-Adapters' prompt, and how a choice is read from an answer."""

import re
from collections.abc import Callable, Sequence

from svdconvert.evaluation.base import DataSource, Grade, Limits, Protocol, Record, Row, Runner, Task
from svdconvert.evaluation.records import read_each, text_of, texts_of

# The published prompt, blanks included: the template is an indented Python string.
_INDENT = 16 * " "
_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request. \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Response:\n{_INDENT}"
)
_STATED = "correct answer is"

PublicReader = Callable[[Record], tuple[str, str]]
"""A row of the original data set -> (LLM-Adapters' instruction, answer)."""


def commonsense_task(
    name: str, summary: str, choices: Sequence[str], data: DataSource, read_public: PublicReader
) -> Task:
    """One of the eight tasks. `choices` are the answers that may be given, such as true and false.

    The rows are those of LLM-Adapters (instruction, answer), or of the original data set.
    """

    def row(number: int, record: Record) -> Row:
        if "instruction" in record:
            instruction = text_of(record, "instruction")
            gold = text_of(record, "answer")
        else:
            instruction, gold = read_public(record)
        if gold not in choices:
            raise ValueError(f"its answer is {gold[:40]!r}, which is not one of {', '.join(choices)}")
        return Row(id=str(number), prompt=_PROMPT.replace("{instruction}", instruction), gold=gold)

    def rows(records: Sequence[Record]) -> list[Row]:
        return read_each(records, row)

    def grade(row: Row, answer: str, protocol: Protocol, runner: Runner | None) -> Grade:
        choice = stated_choice(answer, choices) if protocol == "strict" else first_choice(answer, choices)
        return Grade(choice == row.gold, choice is not None, choice)

    limit = Limits(max_new_tokens=32)
    return Task(
        name=name,
        summary=summary,
        version=1,
        data=data,
        rows=rows,
        grade=grade,
        limits={"strict": limit, "paper": limit},
        groups=("commonsense",),
        paper="LLM-Adapters, as in DoRA and MiLoRA; they search with 4 beams, here the answer is greedy",
    )


def first_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that occurs first, in small letters, also as a part of a word: the published rule."""
    match = re.search("|".join(map(re.escape, choices)), answer)
    return match[0] if match else None


def stated_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice behind the first "the correct answer is", else the only choice that the answer names.

    None if the answer names none, or several without saying which is correct. Capitals make no difference.
    """
    named = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, choices))})(?!\w)", re.IGNORECASE)
    statement = answer.casefold().find(_STATED)
    if statement >= 0:
        match = named.match(answer, _start_of_word(answer, statement + len(_STATED)))
        return match[0].casefold() if match else None
    found = {match[0].casefold() for match in named.finditer(answer)}
    return found.pop() if len(found) == 1 else None


def _start_of_word(text: str, position: int) -> int:
    while position < len(text) and not text[position].isalnum():
        position += 1
    return position


def listed(word: str, texts: Sequence[str]) -> str:
    """Answer1: first Answer2: second ..."""
    return " ".join(f"{word}{number}: {text}" for number, text in enumerate(texts, start=1))


def answer_format(word: str, count: int) -> str:
    """Answer format: answer1/answer2/..."""
    return "Answer format: " + "/".join(f"{word}{number}" for number in range(1, count + 1))


def read_science_question(record: Record) -> tuple[str, str]:
    """A row of ARC or OpenBookQA: a question with labelled choices."""
    choices = record.get("choices")
    labels = choices.get("label") if isinstance(choices, dict) else None
    key = text_of(record, "answerKey")
    if not isinstance(choices, dict) or not isinstance(labels, list) or key not in labels:
        raise ValueError("its choices and its answerKey do not fit")
    texts = texts_of(choices, "text")
    question = text_of(record, "question", "question_stem")
    instruction = (
        f"Please choose the correct answer to the question: {question}\n\n"
        f"{listed('Answer', texts)}\n\n{answer_format('answer', len(texts))}"
    )
    return instruction, f"answer{labels.index(key) + 1}"
