"""What `run` prints in the end: one line for every run, and the means over the seeds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.cli.summaries import listing, summary
from svdconvert.config.sizes import size_text

if TYPE_CHECKING:
    from svdconvert.workflow.outcome import Outcome, Score

_SHOWN = ("report.html", "curves.svg", "results.json")


def show_outcomes(out: Path, found: "Sequence[Outcome]") -> None:
    """Print losses, scores and sizes."""
    tasks = list(dict.fromkeys((score.of, score.task) for one in found for score in one.scores))
    tasks = [(of, task) for of, task in tasks if of != "base"] or tasks
    heads = [task if len({of for of, _ in tasks}) < 2 else f"{task} ({of})" for of, task in tasks]
    columns = ("run", "method", "rate", "loss", "held-out loss", *heads, "weights")
    rows = [_row(one, tasks) for one in found]
    used = [number for number in range(len(columns)) if number == 0 or any(row[number] for row in rows)]
    listing([columns[number] for number in used], [[row[number] for number in used] for row in rows])
    means = list(_means(found))
    if means:
        summary("means over the seeds (smallest to largest)", dict(means))
    files = [str(out / name) for name in _SHOWN if (out / name).exists()]
    summary(f"results in {out}", {Path(path).name: path for path in files})


def _row(one: "Outcome", tasks: Sequence[tuple[str, str]]) -> list[str]:
    scores = {(score.of, score.task): score for score in one.scores}
    found = [scores.get((of, task)) or scores.get(("base", task)) for of, task in tasks]
    return [
        one.run,
        one.method or "",
        f"{one.lr:g}" if one.lr is not None else "",
        _pair(one.loss),
        _pair(one.held_out),
        *(_score(score) if score else "" for score in found),
        ", ".join(f"{folder} {size_text(size)}" for folder, size in one.sizes.items() if size),
    ]


def _pair(losses: tuple[float, float] | None) -> str:
    return f"{losses[0]:.3f} -> {losses[1]:.3f}" if losses else ""


def _score(score: "Score") -> str:
    low, high = score.interval
    others = {name: value for name, value in score.metrics.items() if name != "accuracy"}
    more = "".join(f", {name} {value:.3f}" for name, value in others.items())
    return f"{score.score:.1%} ({low:.1%} to {high:.1%}){more}"


def _means(found: "Sequence[Outcome]") -> "Sequence[tuple[str, str]]":
    """(variant, its means) for the variants with several seeds."""
    groups: dict[str, list[Outcome]] = {}
    for one in found:
        groups.setdefault(one.variant, []).append(one)
    return [(name, _mean(members)) for name, members in groups.items() if len(members) > 1]


def _mean(members: "Sequence[Outcome]") -> str:
    parts = []
    losses = [one.held_out[1] for one in members if one.held_out]
    if losses:
        parts.append(f"held-out loss {_spread(losses, '{:.3f}'.format)}")
    for of, task in dict.fromkeys((score.of, score.task) for one in members for score in one.scores):
        scores = [s.score for one in members for s in one.scores if (s.of, s.task) == (of, task)]
        parts.append(f"{task} {_spread(scores, '{:.1%}'.format)}")
    return ", ".join(parts)


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    mean = sum(values) / len(values)
    return f"{text(mean)} ({text(min(values))} to {text(max(values))})"
