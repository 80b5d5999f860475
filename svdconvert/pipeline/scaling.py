"""Rank and scale of every adapted matrix, from the options and as adapter_config.json says them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TypeVar

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.config.options import SplitOptions
from svdconvert.errors import TargetError
from svdconvert.layouts.base import Layout, Slot

T = TypeVar("T", int, float)


@dataclass(frozen=True, slots=True)
class Scaling:
    """Of one matrix."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)


def scalings(
    layout: Layout, infos: Mapping[str, TensorInfo], slots: Mapping[str, Slot], options: SplitOptions
) -> dict[str, Scaling]:
    """Rank and alpha of the tensors in `slots`. Raises TargetError where a pattern fits none of them."""
    ranks = _spread(layout, infos, slots, options.rank_pattern or {})
    alphas = _spread(layout, infos, slots, options.alpha_pattern or {})
    found = {}
    for name in slots:
        rank = ranks.get(name, options.rank)
        found[name] = Scaling(rank, float(alphas.get(name, options.alpha or rank)), options.rslora)
    return found


def _spread(
    layout: Layout, infos: Mapping[str, TensorInfo], slots: Mapping[str, Slot], pattern: Mapping[str, T]
) -> dict[str, T]:
    """A pattern's values by tensor; the last entry that fits holds."""
    values: dict[str, T] = {}
    for target, value in pattern.items():
        names = layout.select(infos, [target]).keys() & slots.keys()
        if not names:
            raise TargetError(
                f"a pattern names {target!r}, of which no matrix is decomposed; "
                "leave it out, or add it to the targets"
            )
        values |= dict.fromkeys(names, value)
    return values


def as_pattern(values: Mapping[str, T], default: T) -> dict[str, T]:
    """PEFT's rank_pattern or alpha_pattern for values by module: those that are not the default.

    A key is a module's last component where all that end in it agree, else the whole path.
    """
    by_last: dict[str, set[T]] = {}
    for module, value in values.items():
        by_last.setdefault(_last(module), set()).add(value)
    keys = {
        (_last(module) if len(by_last[_last(module)]) == 1 else module): value
        for module, value in values.items()
        if value != default
    }
    return dict(sorted(keys.items()))


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]
