"""The picture of an experiment: the learning curves of its variants, and their scores with intervals."""

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from svdconvert.config.display import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[int, float]]
Curves = Sequence[tuple[str, Mapping[str, Points]]]
"""(variant, name of a measurement -> its points), once for every seed."""
Bars = Sequence[tuple[str, str, str, float, tuple[float, float]]]
"""(run, variant, task, score, interval)."""

_TITLES = {"eval_loss": "held-out loss", "matthews": "Matthews", "f1": "F1"}
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "svdconvert",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,
}
_WIDTH = 4.6  # inches of a panel
_HEIGHT = 3.4
_ROW = 0.22  # inches of a score


def draw_learning(curves: Curves, bars: Bars) -> str:
    """An SVG: a panel for each measurement and each task. The same values give the same bytes.

    A curve is the mean over the seeds, in a band from the least to the largest.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for _, series in curves for name in series))
    tasks = list(dict.fromkeys(task for _, _, task, _, _ in bars))
    variants = list(dict.fromkeys([*(variant for variant, _ in curves), *(one[1] for one in bars)]))
    colours = {variant: f"C{number % 10}" for number, variant in enumerate(variants)}
    rows = max((sum(one[2] == task for one in bars) for task in tasks), default=0)
    count = max(1, len(names) + len(tasks))
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH * count, max(_HEIGHT, 1 + _ROW * rows)), layout="tight")
        panels = figure.subplots(1, count, squeeze=False)[0]
        for panel, name in zip(panels, names, strict=False):
            _draw_curves(panel, name, curves, colours)
        for panel, task in zip(panels[len(names) :], tasks, strict=False):
            _draw_scores(panel, task, [one for one in bars if one[2] == task], colours)
        stream = StringIO()
        nothing: dict[str, Any] = {"Creator": None, "Date": None}
        figure.savefig(stream, format="svg", metadata=nothing)
    return stream.getvalue()


def _draw_curves(panel: "Axes", name: str, curves: Curves, colours: Mapping[str, str]) -> None:
    for variant, colour in colours.items():
        members = [series[name] for one, series in curves if one == variant and name in series]
        if not members:
            continue
        values: dict[int, list[float]] = {}
        for points in members:
            for step, value in points:
                values.setdefault(step, []).append(value)
        steps = sorted(values)
        panel.plot(
            steps,
            [sum(values[step]) / len(values[step]) for step in steps],
            color=colour,
            marker="o",
            markersize=2.5,
            label=visible(variant),
        )
        low, high = ([kind(values[step]) for step in steps] for kind in (min, max))
        panel.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    panel.set(title=_TITLES.get(name, name), xlabel="step")
    panel.legend()


def _draw_scores(panel: "Axes", task: str, bars: Bars, colours: Mapping[str, str]) -> None:
    for number, (_, variant, _, score, (low, high)) in enumerate(bars):
        panel.plot([low, high], [number, number], color=colours[variant], lw=2)
        panel.plot([score], [number], "o", color=colours[variant], ms=4.5)
    panel.set_yticks(range(len(bars)), [visible(label) for label, *_ in bars])
    panel.set_ylim(len(bars) - 0.5, -0.5)
    panel.set(title=f"{visible(task)}: share correct, 95 % intervals", xlim=(-0.02, 1.02))
    panel.grid(axis="y", visible=False)
