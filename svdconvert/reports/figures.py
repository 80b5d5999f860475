"""The curves of a report, drawn by matplotlib as SVG that takes its text colour from the page around it."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from svdconvert.config.display import visible
from svdconvert.errors import MissingPackageError
from svdconvert.manifest.training import Point, averaged, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#010203"
"""Stands for the page's text colour, which a page in dark mode changes."""
_COLOURS = ("#3b7dd8", "#d9772f", "#2f9e6e", "#b8508f", "#7f66cc", "#a3842a", "#3f9fb0", "#c8504a")
"""Of medium lightness, so that they are visible on white and on black."""
_DASHES = ("-", "--", ":", "-.")
_SIZE = (5.4, 3.1)  # inches
_POINTS = 400
_LONGEST = 32  # characters of a name in a legend
_MOST_NAMES = 8  # names in a legend
_SETTINGS: Any = {
    "svg.hashsalt": "svdconvert",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
    "axes.grid": True,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a figure."""

    points: Sequence[tuple[float, float]]
    label: str | None = None
    colour: int = 0
    """Curves of one directory, or of one role, share a number."""
    marked: bool = False
    """With a marker at each point."""
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measured share with its interval, or a published one without."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0


def require_matplotlib() -> None:
    """Raise MissingPackageError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            'report draws with matplotlib, which is not installed: pip install "svdconvert[plot]"'
        ) from error


def curves(title: str, x: str, lines: Sequence[Curve]) -> str:
    """A figure with one or more lines over `x`."""
    with _axes(title) as (axes, svg):
        for line in _without_repetitions(lines):
            _draw(axes, line)
        _whole_numbers(axes, x)
        _legend(axes)
    return svg.text


def bands(title: str, x: str, groups: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """A figure with one line for each group: the mean of its members, in a band from least to largest.

    Members are lists of values at 1, 2, ..; a member that ends earlier counts only up to its end.
    """
    with _axes(title) as (axes, svg):
        for number, (name, members) in enumerate(groups.items()):
            longest = max(map(len, members), default=0)
            rows = [[one[at] for one in members if at < len(one)] for at in range(longest)]
            places = range(1, longest + 1)
            means = [sum(row) / len(row) for row in rows]
            colour = _COLOURS[number % len(_COLOURS)]
            axes.fill_between(
                places, [min(row) for row in rows], [max(row) for row in rows], color=colour, alpha=0.07, lw=0
            )
            _draw(axes, Curve(points=list(zip(places, means, strict=True)), label=name, colour=number))
        _whole_numbers(axes, x)
        _logarithmic(axes)
        _legend(axes)
    return svg.text


def intervals(title: str, rows: Sequence[Interval]) -> str:
    """A figure with a dot and its interval in each row; without an interval the dot is hollow."""
    height = 0.75 + 0.27 * len(rows)
    with _axes(title, (_SIZE[0], height)) as (axes, svg):
        for number, row in enumerate(rows):
            colour = _COLOURS[row.colour % len(_COLOURS)]
            if row.low is None or row.high is None:
                axes.plot([row.value], [number], "o", mfc="none", mec=_INK, ms=5)
            else:
                axes.plot([row.low, row.high], [number, number], color=colour, lw=2, solid_capstyle="round")
                axes.plot([row.value], [number], "o", color=colour, ms=5.5)
        axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y", visible=False)
    return svg.text


def reduced(points: Sequence[Point], *, mean: bool) -> Sequence[Point]:
    """At most as many points as a figure shows: means over equal parts, or some of the points."""
    return averaged(points, _POINTS) if mean else thinned(points, _POINTS)


def _without_repetitions(lines: Sequence[Curve]) -> list[Curve]:
    """The lines, equal ones once with all their labels: a LoRA has the losses of the run it comes from."""
    found: dict[tuple[Any, bool], Curve] = {}
    for line in lines:
        key = (tuple(line.points), line.faint)
        known = found.get(key)
        if known is None:
            found[key] = line
        elif line.label and line.label not in (known.label or "").split(", "):
            found[key] = replace(known, label=f"{known.label}, {line.label}" if known.label else line.label)
    return list(found.values())


def _draw(axes: "Axes", line: Curve) -> None:
    number = line.colour
    axes.plot(
        [x for x, _ in line.points],
        [y for _, y in line.points],
        color=_COLOURS[number % len(_COLOURS)],
        linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)],
        alpha=0.4 if line.faint else 1.0,
        linewidth=1.0 if line.faint else 1.5,
        marker="o" if line.marked or len(line.points) == 1 else None,
        markersize=3.2,
        label=_short(line.label) if line.label else None,
    )


def _whole_numbers(axes: "Axes", label: str) -> None:
    """A horizontal axis of steps, ranks or indices."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _logarithmic(axes: "Axes") -> None:
    """A logarithmic scale with plain numbers, which need no mathematical typesetting."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(labels) <= _MOST_NAMES:
        columns = 4 if max(map(len, labels)) < 12 else 2
        axes.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=columns, handlelength=1.4
        )


def _short(name: str) -> str:
    name = visible(name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


@dataclass
class _Svg:
    """The finished figure; empty until its axes are left."""

    text: str = ""


@contextmanager
def _axes(title: str, size: tuple[float, float] = _SIZE) -> "Iterator[tuple[Axes, _Svg]]":
    """Empty axes, and the SVG that they become when the context is left."""
    import matplotlib
    from matplotlib.figure import Figure

    made = _Svg()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as a glyph that the font for measuring widths lacks
        figure = Figure(figsize=size)
        axes = figure.add_subplot()
        axes.set_title(title)
        yield axes, made
        made.text = _save(figure, title)


def _save(figure: Any, title: str) -> str:
    stream = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(
        stream, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.06, metadata=nothing
    )
    return inlined(stream.getvalue(), title)


def inlined(svg: str, title: str) -> str:
    """A file of matplotlib as an element of HTML that scales."""
    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', body)
    name = escape(visible(title))
    start = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{name}" class="figure">'
    body = re.sub(r"<(metadata|style).*?</\1>", "", body[body.index(">") + 1 :], flags=re.DOTALL)
    return (start + body.replace("xlink:href", "href").replace(_INK, "currentColor")).strip()


def numbered(svg: str, number: int) -> str:
    """The figure with ids that begin with its number: an id must be unique in a page."""
    return re.sub(r'(\sid="|\shref="#|url\(#)', rf"\g<1>f{number}-", svg)
