"""What `eval --compare` prints: a table for each task, and how sure a difference is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.cli.summaries import listing, show_line
from svdconvert.cli.terminal import leads

if TYPE_CHECKING:
    from svdconvert.evaluation.comparison import ComparedResult, ComparedTask, Comparison, PairedTest

_SCORES = ("directory", "method", "rank", "n", "right", "95 % interval")
_PAIRED = ("directory", "rows", "only first", "only this", "difference", "95 % interval", "p")


def show_comparison(comparison: "Comparison") -> None:
    """Print every task's tables. Scores and differences are in percent."""
    if not leads():
        return
    for task in comparison.tasks:
        names = _names(task.results)
        show_line(f"{task.task}, graded {task.protocol}")
        listing(_SCORES, [(name, *_score(one)) for name, one in zip(names, task.results, strict=True)])
        show_line(f"paired with {names[0]}, the first, by McNemar's exact test")
        tests = [(name, one.against_first) for name, one in zip(names, task.results, strict=True)]
        listing(_PAIRED, [(name, *_paired(test)) for name, test in tests if test is not None])
        _show_left_out(task)
        for line in dict.fromkeys(_published_lines(task.results)):
            show_line(line)


def _names(results: "Sequence[ComparedResult]") -> list[str]:
    """The names of the directories, or their paths if two have one name."""
    paths = [result.directory for result in results]
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else paths


def _score(result: "ComparedResult") -> tuple[object, ...]:
    return (
        result.method or "-",
        result.rank or "-",
        result.n,
        _percent(result.score),
        _interval(result.interval),
    )


def _paired(test: "PairedTest") -> tuple[object, ...]:
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
