"""One self-contained HTML page about directories: tables, curves, heat maps and samples."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from svdconvert.config.display import visible
from svdconvert.manifest.training import Point
from svdconvert.reports.collect import Subject
from svdconvert.reports.facts import by_role, described, overview, score_rows
from svdconvert.reports.figures import Curve, Interval, bands, curves, intervals, numbered, reduced
from svdconvert.reports.heatmap import inline_heatmap
from svdconvert.version import __version__

_DRIFT = {
    "sigma_drift": "Drift of the singular values: mean |s - s0|",
    "u_rotation": "Rotation of the left singular vectors: 1 - mean |cos|",
    "v_rotation": "Rotation of the right singular vectors: 1 - mean |cos|",
}
_MOST_SAMPLES = 3


def render(subjects: Sequence[Subject]) -> str:
    """The page. The same directories give the same bytes."""
    numbers = count(1)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=_title([subject.name for subject in subjects]),
        overview=_table([overview(subject) for subject in subjects]),
        subjects=[_section(subject, numbers) for subject in subjects],
        names=[subject.name for subject in subjects],
        scores=score_rows(subjects),
        shared=[_embedded(figure, numbers) for figure in _shared_figures(subjects)],
        version=__version__,
    )


def _title(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    if len(names) > 3:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _finalize(value: Any) -> Any:
    """Foreign text without control characters, which HTML does not allow."""
    return visible(value, "\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def _table(rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Columns in which at least one row has a value."""
    names = list(dict.fromkeys(name for row in rows for name in row if row[name]))
    return {"columns": names, "rows": [[row.get(name, "") for name in names] for row in rows]}


def _embedded(figure: str, numbers: Iterator[int]) -> Markup:
    """A figure of ours, whose text is escaped, with the next number."""
    return Markup(numbered(figure, next(numbers)))


def _section(subject: Subject, numbers: Iterator[int]) -> dict[str, Any]:
    spectra = {
        "Singular values of the adapter at its start": subject.spectra.adapter,
        "Singular values of the change by training": subject.spectra.change,
    }
    return {
        "name": subject.name,
        "summary": subject.inspection.summary[:1].upper() + subject.inspection.summary[1:],
        "facts": described(subject),
        "heatmaps": [
            {"title": title, "svg": Markup(inline_heatmap(title, grid)), "rows": by_role(grid)}
            for title, grid in subject.grids.items()
        ],
        "figures": [
            _embedded(bands(title, "index", {role: roles[role] for role in sorted(roles)}), numbers)
            for title, roles in spectra.items()
            if any(any(members) for members in roles.values())
        ],
        "samples": subject.training.samples[:_MOST_SAMPLES] if subject.training else (),
        "missing": subject.missing,
    }


def _shared_figures(subjects: Sequence[Subject]) -> Iterator[str]:
    """The figures in which all directories stand next to each other."""
    if scores := list(_score_rows(subjects)):
        yield intervals("Scores with 95 % intervals; hollow: published", scores)
    if losses := list(_losses(subjects)):
        yield curves("Loss (line) and held-out loss (dots)", "step", losses)
    if rates := _lines(subjects, "lr"):
        yield curves("Learning rate", "step", rates)
    for name, title in _DRIFT.items():
        if lines := _lines(subjects, name):
            yield curves(title, "step", lines)
    if errors := list(_truncations(subjects)):
        yield curves("Truncation of the change: relative error by rank", "rank of every matrix", errors)


def _losses(subjects: Sequence[Subject]) -> Iterator[Curve]:
    for number, subject in enumerate(subjects):
        training = subject.training
        trained = subject.series.of("loss") or (training.losses if training else ())
        held_out = subject.series.of("eval_loss") or (training.held_out if training else ())
        if trained:
            label = None if held_out else subject.name
            yield Curve(points=_numbers(trained, mean=True), label=label, colour=number, faint=bool(held_out))
        if held_out:
            yield Curve(points=_numbers(held_out), label=subject.name, colour=number, marked=True)


def _lines(subjects: Sequence[Subject], name: str) -> list[Curve]:
    """One curve for every directory with this measurement."""
    return [
        Curve(points=_numbers(points), label=subject.name, colour=number, marked=len(points) < 40)
        for number, subject in enumerate(subjects)
        if (points := subject.series.of(name))
    ]


def _numbers(points: Sequence[Point], *, mean: bool = False) -> list[tuple[float, float]]:
    return [(float(step), value) for step, value in reduced(points, mean=mean)]


def _truncations(subjects: Sequence[Subject]) -> Iterator[Curve]:
    for number, subject in enumerate(subjects):
        if subject.spectra.truncation:
            points = [(float(rank), error) for rank, error in subject.spectra.truncation]
            yield Curve(points=points, label=subject.name, colour=number)


def _score_rows(subjects: Sequence[Subject]) -> Iterator[Interval]:
    """By task and then by directory; published numbers once, after the directories."""
    tasks = dict.fromkeys(result.task for subject in subjects for result in subject.results)
    for task in tasks:
        published: dict[str, Interval] = {}
        for number, subject in enumerate(subjects):
            for result in (one for one in subject.results if one.task == task):
                strict = result.grades.get("strict")
                if strict is not None:
                    low, high = strict.interval
                    yield Interval(
                        label=f"{task}: {subject.name}", value=strict.score, low=low, high=high, colour=number
                    )
                for one in result.published:
                    label = f"{task}: {one.model} {one.method}"
                    published.setdefault(f"{label} {one.score}", Interval(label=label, value=one.score))
        yield from published.values()
