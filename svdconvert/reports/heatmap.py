"""A picture of numbers by layer and role, as one SVG file without anything that is loaded from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from math import log10

from svdconvert.config.display import visible

_CELL = 30  # pixels
_SMALL = 18  # pixels of a cell in a page
_LONGEST = 24  # characters of a role in a page
_FAR_APART = 100
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
        f"<title>{escape(visible(title))}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="22" font-size="14">{escape(visible(title))}</text>',
        f'<text x="{_LEFT}" y="46">layer</text>',
    ]
    for column, layer in enumerate(layers):
        if column % _every(len(layers)) == 0:
            parts.append(f'<text x="{_LEFT + _CELL * column + 6}" y="{_TOP - 8}">{layer}</text>')
    for row, role in enumerate(roles):
        y = _TOP + _CELL * row
        parts.append(f'<text x="10" y="{y + 20}">{escape(visible(role))}</text>')
        parts += [
            _cell(_LEFT + _CELL * column, y, f"{role}, layer {layer}", values[layer, role], (low, high))
            for column, layer in enumerate(layers)
            if (layer, role) in values
        ]
    parts.append(f'<text x="10" y="{height - 16}">from {low:.2e} (light) to {high:.2e} (dark)</text>')
    return "\n".join([*parts, "</svg>", ""])


def inline_heatmap(title: str, values: Mapping[tuple[int, str], float]) -> str:
    """The same as an element of a page whose colours it takes: the larger a value, the more opaque its cell.

    From the least to the largest value on a linear scale, on a logarithmic one if they are far apart.
    """
    roles = sorted({role for _, role in values})
    layers = sorted({layer for layer, _ in values})
    low = min(values.values())
    high = max(values.values())
    roles = [visible(role) for role in roles]
    values = {(layer, visible(role)): value for (layer, role), value in values.items()}
    shown = {role: role if len(role) <= _LONGEST else f"{role[: _LONGEST - 3]}..." for role in roles}
    left = 14 + 7 * max(map(len, shown.values()))
    width = left + _SMALL * len(layers) + 8
    height = 24 + _SMALL * len(roles) + 26
    parts = [
        f'<svg viewBox="0 0 {max(width, 300)} {height}" width="{max(width, 300)}" role="img" '
        f'aria-label="{escape(title)}" class="heatmap">'
    ]
    for column, layer in enumerate(layers):
        if column % _every(len(layers), 12) == 0:
            parts.append(f'<text x="{left + _SMALL * column + 3}" y="16">{layer}</text>')
    for row, role in enumerate(roles):
        y = 24 + _SMALL * row
        parts.append(f'<text x="0" y="{y + 13}">{escape(shown[role])}</text>')
        for column, layer in enumerate(layers):
            if (value := values.get((layer, role))) is not None:
                parts.append(
                    f'<rect x="{left + _SMALL * column}" y="{y}" width="{_SMALL - 2}" height="{_SMALL - 2}" '
                    f'rx="2" fill-opacity="{_opacity(value, low, high):.2f}"><title>{escape(role)}, layer '
                    f"{layer}: {value:.4g}</title></rect>"
                )
    parts.append(f'<text x="0" y="{height - 6}">from {low:.3g} (faint) to {high:.3g} (strong)</text></svg>')
    return "".join(parts)


def _opacity(value: float, low: float, high: float) -> float:
    if high <= low:
        return 0.8
    if low > 0 and high > _FAR_APART * low:
        return 0.1 + 0.9 * log10(value / low) / log10(high / low)
    return 0.1 + 0.9 * (value - low) / (high - low)


def _every(count: int, most: int = 40) -> int:
    """Every how many columns a layer's number is written, so that numbers do not overlap."""
    return 1 if count <= most else 5


def _cell(x: int, y: int, label: str, value: float, span: tuple[float, float]) -> str:
    size = _CELL - 2
    return (
        f'<rect x="{x}" y="{y}" width="{size}" height="{size}" fill="{_colour(value, span)}" stroke="#ccc">'
        f"<title>{escape(visible(label))}: {value:.3e}</title></rect>"
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
