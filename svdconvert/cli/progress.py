"""Progress bars, which are shown only if standard error is a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column

from svdconvert.cli.terminal import leads, plain, stderr
from svdconvert.config.progress import Progress, Track, ignore_progress

if TYPE_CHECKING:
    from svdconvert.training.logs.metrics import Log


@contextmanager
def tensors(what: str, *, of_bytes: bool = True) -> Iterator[Track]:
    """A bar with tensor, shard, amount and remaining time; nothing if standard error is not a terminal."""
    if not leads() or not stderr.is_terminal:
        yield ignore_progress
        return
    amount: ProgressColumn = DownloadColumn() if of_bytes else MofNCompleteColumn()
    with _bar(amount) as bar:
        task = bar.add_task(what, total=None, at="")

        def track(step: Progress) -> None:
            bar.update(task, completed=step.done, total=step.total, at=plain(f"{step.name} {step.file}"))

        yield track


def _bar(amount: ProgressColumn) -> Bar:
    """A bar with amount, remaining time and position; a narrow terminal shortens the position."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        amount,
        TimeRemainingColumn(),
        TextColumn(
            "{task.fields[at]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        ),
    ]
    return Bar(*columns, console=stderr, transient=True, expand=True)


@contextmanager
def steps() -> Iterator[Callable[["Log", int], None]]:
    """A bar with loss, tokens per second and remaining time; nothing if standard error is not a terminal."""
    if not leads() or not stderr.is_terminal:
        yield lambda log, steps: None
        return
    from svdconvert.training.optim.loop import EvalLog, StepLog

    with _bar(MofNCompleteColumn()) as bar:
        task = bar.add_task("train", total=None, at="")
        started = monotonic()
        held_out = ""

        def watch(log: "Log", steps: int) -> None:
            nonlocal held_out
            if isinstance(log, EvalLog):
                held_out = f"held-out {log.eval_loss:.4f}"
                bar.update(task, completed=log.step, total=steps, at=held_out)
            elif isinstance(log, StepLog):
                speed = log.tokens / max(monotonic() - started, 1e-9)
                at = f"loss {log.loss:.4f}  lr {log.lr:.2e}  {speed:.0f} tokens/s  {held_out}"
                bar.update(task, completed=log.step, total=steps, at=at)

        yield watch
