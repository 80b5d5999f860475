"""A picture of numbers by layer and role, as one SVG file without anything that is loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from math import log10

_CELL = 30  # pixels
_LEFT = 130
_TOP = 76
_STOPS = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
"""Light to dark blue, which also differ in grey."""


def heatmap(
    title: str, roles: Sequence[str], layers: Sequence[int], values: Mapping[tuple[int, str], float]
) -> str:
    """The SVG: one row for each role, one column for each layer; colours are on a logarithmic scale.

    A cell's title has its value. A cell without a value is left empty, a zero is white.
    """
    positive = [value for value in values.values() if value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    width = _LEFT + _CELL * len(layers) + 20
    height = _TOP + _CELL * len(roles) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 420)}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{_text(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="22" font-size="14">{_text(title)}</text>',
        f'<text x="{_LEFT}" y="46">layer</text>',
    ]
    for column, layer in enumerate(layers):
        if column % _every(len(layers)) == 0:
            parts.append(f'<text x="{_LEFT + _CELL * column + 6}" y="{_TOP - 8}">{layer}</text>')
    for row, role in enumerate(roles):
        y = _TOP + _CELL * row
        parts.append(f'<text x="10" y="{y + 20}">{_text(role)}</text>')
        parts += [
            _cell(_LEFT + _CELL * column, y, f"{role}, layer {layer}", values[layer, role], (low, high))
            for column, layer in enumerate(layers)
            if (layer, role) in values
        ]
    parts.append(f'<text x="10" y="{height - 16}">from {low:.2e} (light) to {high:.2e} (dark)</text>')
    return "\n".join([*parts, "</svg>", ""])


def _text(value: str) -> str:
    """Text for SVG, with control and format characters as escapes: XML allows only some of them."""
    visible = (one if one.isprintable() else one.encode("unicode_escape").decode() for one in value)
    return escape("".join(visible))


def _every(count: int) -> int:
    """Every how many columns a layer's number is written, so that numbers do not overlap."""
    return 1 if count <= 40 else 5


def _cell(x: int, y: int, label: str, value: float, span: tuple[float, float]) -> str:
    size = _CELL - 2
    return (
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{_colour(value, span)}" stroke="#ccc">'
        f"<title>{_text(label)}: {value:.3e}</title></rect>"
    )


def _colour(value: float, span: tuple[float, float]) -> str:
    low, high = span
    if value <= 0:
        return "#ffffff"
    share = log10(value / low) / log10(high / low) if high > low else 1.0
    place = max(0.0, min(1.0, share)) * (len(_STOPS) - 1)
    before = min(int(place), len(_STOPS) - 2)
    pairs = zip(_STOPS[before], _STOPS[before + 1], strict=True)
    mixed = [round(one + (other - one) * (place - before)) for one, other in pairs]
    return "#" + "".join(f"{part:02x}" for part in mixed)
