"""Curves and heat maps in block characters, as a terminal shows them below an inspection."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from svdconvert.output.sparkline import sparkline

if TYPE_CHECKING:
    from svdconvert.inputs.inspection import Inspection

_SHADES = "·░▒▓█"
_WITH_GRID = ("decomposed", "merged", "lora")
_LEAST = 40  # columns of a terminal with pictures
_SHORTEST = 3  # values of a curve


def pictures(found: "Inspection", width: int) -> Iterator[str]:
    """The lines of the pictures that fit into `width` columns: losses, and the first heat map of the kind."""
    if width < _LEAST:
        return
    for name, values in found.curves.items():
        if len(values) >= _SHORTEST:
            ends = f"  {values[0]:.4f} to {values[-1]:.4f}"
            label = f"{name:14}"
            yield label + sparkline(values, min(60, width - len(label) - len(ends))) + ends
    if found.kind in _WITH_GRID and found.grids:
        title, rows = next(iter(found.grids.items()))
        yield from _heatmap(title, rows, width)


def _heatmap(title: str, rows: Mapping[str, Mapping[int, float]], width: int) -> Iterator[str]:
    """One line for each role, one character for each layer; nothing if that does not fit."""
    layers = sorted({layer for row in rows.values() for layer in row})
    values = [value for row in rows.values() for value in row.values()]
    label = max(map(len, rows)) + 2
    if label + len(layers) > width:
        return
    low = min(values)
    high = max(values)
    yield ""
    yield f"{title}, by layer ({layers[0]} to {layers[-1]}) and role"
    for role, row in rows.items():
        cells = (_shade(row[layer], low, high) if layer in row else " " for layer in layers)
        yield f"{role:{label}}" + "".join(cells)
    yield f"{'':{label}}{_SHADES[0]} is {low:.3g}, {_SHADES[-1]} is {high:.3g}"


def _shade(value: float, low: float, high: float) -> str:
    steps = len(_SHADES) - 1
    return _SHADES[round((value - low) / (high - low) * steps) if high > low else steps]
