"""What the GLUE tasks share: a classifier's label against the data's, and GLUE's scores."""

from collections.abc import Mapping, Sequence
from math import isfinite

from svdconvert.errors import DataError, brief
from svdconvert.evaluation.base import DataSource, Grade, Protocol, Record, Row, Runner, Task
from svdconvert.evaluation.records import read_each, text_of

_PAPER = "GLUE, as in PiSSA (appendix L) and the experiments with LoRA-FA; no prompt, a classifier answers"
_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
_LABELS = ("label", "gold_label", "Quality", "is_duplicate")
_SCORES = ("label", "score")

Fields = Sequence[Sequence[str]]
"""For each text, the names that its field may have: on the Hub, and in GLUE's own .tsv files."""


def _source(name: str, split: str) -> DataSource:
    return DataSource(name="nyu-mll/glue", configs=(name,), split=split, revision=_REVISION)


def _texts(record: Record, fields: Fields) -> tuple[str, dict[str, str]]:
    first, *others = [text_of(record, *names) for names in fields]
    return first, {"second": others[0]} if others else {}


def classification_task(
    name: str,
    summary: str,
    fields: Fields,
    labels: Sequence[str],
    *,
    headline: str = "accuracy",
    split: str = "validation",
) -> Task:
    """A task with classes. `labels` are their names in the order of the Hub's numbers."""

    def row(number: int, record: Record) -> Row:
        text, extra = _texts(record, fields)
        gold = _class_of(record, labels)
        return Row(id=str(number), prompt=text, gold=labels[gold], extra=extra)

    def rows(records: Sequence[Record]) -> list[Row]:
        return read_each(records, row)

    def grade(row: Row, answer: str, protocol: Protocol, runner: Runner | None) -> Grade:
        index = _named(answer, labels)
        return Grade(index is not None and labels[index] == row.gold, index is not None, answer)

    def metrics(rows: Sequence[Row], answers: Sequence[str]) -> Mapping[str, float]:
        return class_metrics(rows, answers, labels)

    config = name.partition("-")[0]
    return Task(
        name=name,
        summary=summary,
        version=1,
        data=_source(config, split),
        rows=rows,
        grade=grade,
        kind="classify",
        headline=headline,
        metrics=metrics,
        groups=("glue",),
        paper=_PAPER,
    )


def _class_of(record: Record, labels: Sequence[str]) -> int:
    name = next((name for name in _LABELS if record.get(name) is not None), "label")
    value = record.get(name)
    index = _named(str(value), labels) if isinstance(value, str | int | float) else None
    if index is None:
        raise DataError(f"its {name} is {brief(value)}, which is not one of {', '.join(labels)}")
    return index


def _named(answer: str, labels: Sequence[str]) -> int | None:
    """The class that a label names: by its name, its number, or as transformers' LABEL_0."""
    text = answer.strip()
    if text in labels:
        return labels.index(text)
    number = text.removeprefix("LABEL_")
    if number.isdecimal() and len(number) < 4 and int(number) < len(labels):
        return int(number)
    return None


def class_metrics(rows: Sequence[Row], answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """F1 and the Matthews correlation; an answer that is no class counts as a wrong one."""
    from svdconvert.training.optim.heads import class_scores

    golds = [labels.index(str(row.gold)) for row in rows]
    predicted: list[float] = []
    for gold, answer in zip(golds, answers, strict=True):
        index = _named(answer, labels)
        predicted.append((gold + 1) % len(labels) if index is None else index)
    scores = class_scores([float(gold) for gold in golds], predicted, len(labels))
    return {name: scores[name] for name in ("f1", "matthews")}


def regression_task(name: str, summary: str, fields: Fields, nearness: float) -> Task:
    """A task with numbers: an answer at most `nearness` away is right; the headline is Pearson's r."""

    def row(number: int, record: Record) -> Row:
        text, extra = _texts(record, fields)
        value = next((record[field] for field in _SCORES if record.get(field) is not None), None)
        gold = _number(value)
        if gold is None:
            raise DataError(f"its label is {brief(value)}, which is not a number")
        return Row(id=str(number), prompt=text, gold=gold, extra=extra)

    def rows(records: Sequence[Record]) -> list[Row]:
        return read_each(records, row)

    def grade(row: Row, answer: str, protocol: Protocol, runner: Runner | None) -> Grade:
        number = _number(answer)
        return Grade(number is not None and abs(number - row.gold) <= nearness, number is not None, answer)

    return Task(
        name=name,
        summary=summary,
        version=1,
        data=_source(name, "validation"),
        rows=rows,
        grade=grade,
        kind="classify",
        headline="pearson",
        metrics=number_metrics,
        groups=("glue",),
        paper=_PAPER,
    )


def _number(value: object) -> float | None:
    if not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


def number_metrics(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; an answer that is no number counts as 0."""
    from svdconvert.training.optim.heads import number_scores

    return number_scores([float(row.gold) for row in rows], [_number(answer) or 0.0 for answer in answers])
