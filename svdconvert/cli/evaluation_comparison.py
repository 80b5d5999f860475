"""What `eval --compare` prints: a table for each task, and how sure a difference is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from svdconvert.cli.summaries import listing, show_line
from svdconvert.cli.terminal import leads

if TYPE_CHECKING:
    from svdconvert.evaluation.comparison import ComparedResult, ComparedTask, Comparison, PairedTest

_COLUMNS = ("directory", "method", "rank", "n", "right", "95 % interval")
_PAIRED = ("rows in both", "only first", "only this", "difference", "95 % interval", "p")


def show_comparison(comparison: "Comparison") -> None:
    """Print every task's table. Scores are in percent."""
    if not leads():
        return
    for task in comparison.tasks:
        first = task.results[0]
        show_line(
            f"{task.task}, graded {task.protocol}; paired with {first.directory} by McNemar's exact test"
        )
        listing((*_COLUMNS, *_PAIRED), [_row(result) for result in task.results])
        _show_left_out(task)
        for line in dict.fromkeys(_published_lines(task.results)):
            show_line(line)


def _row(result: "ComparedResult") -> tuple[object, ...]:
    own = (
        result.directory,
        result.method or "-",
        result.rank or "-",
        result.n,
        _percent(result.score),
        _interval(result.interval),
    )
    return (*own, *_paired(result.against_first))


def _paired(test: "PairedTest | None") -> tuple[object, ...]:
    if test is None:
        return ("-",) * len(_PAIRED)
    return (
        test.rows,
        test.only_first,
        test.only_this,
        f"{100 * test.difference:+.2f}",
        _interval(test.interval),
        f"{test.p:.3g}",
    )


def _show_left_out(task: "ComparedTask") -> None:
    for result in task.results:
        test = result.against_first
        if test is not None and test.left_out:
            show_line(f"{test.left_out} rows that {result.directory} and the first do not share are left out")


def _published_lines(results: "Sequence[ComparedResult]") -> list[str]:
    return [
        f"published: {row.model} {row.method}{f' r {row.rank}' if row.rank else ''} {_percent(row.score)} "
        f"({row.data}; {row.source})"
        for result in results
        for row in result.published
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
