"""Numbers as one line of block characters: the shape of a curve, readable in any text."""

from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """At most `width` characters, the lowest value as ▁ and the highest as █; empty without values.

    More values than characters are averaged over equal parts.
    """
    size = -(-len(values) // width) or 1
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(part) / len(part) for part in parts]
    low = min(means, default=0.0)
    height = max(means, default=0.0) - low
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((mean - low) / height * steps) if height else 0] for mean in means)
