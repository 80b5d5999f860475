"""Rank and scale of every adapted matrix: computed from the options, written to adapter_config.json."""

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
    """Rank and alpha of one matrix."""

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
    """Rank and alpha of the tensors in `slots`. Raises TargetError if a pattern matches none."""
    ranks = _values_by_tensor(layout, infos, slots, options.rank_pattern or {})
    alphas = _values_by_tensor(layout, infos, slots, options.alpha_pattern or {})
    found = {}
    for name in slots:
        rank = ranks.get(name, options.rank)
        found[name] = Scaling(rank, float(alphas.get(name, options.alpha or rank)), options.rslora)
    return found


def _values_by_tensor(
    layout: Layout, infos: Mapping[str, TensorInfo], slots: Mapping[str, Slot], pattern: Mapping[str, T]
) -> dict[str, T]:
    """The values of a pattern by tensor; if several entries match a tensor, the last one is used."""
    values: dict[str, T] = {}
    for target, value in pattern.items():
        names = layout.select(infos, [target]).keys() & slots.keys()
        if not names:
            raise TargetError(
                f"a pattern names {target!r}, which matches none of the decomposed matrices; "
                "leave it out, or add it to the targets"
            )
        values |= dict.fromkeys(names, value)
    return values


def as_pattern(values: Mapping[str, T], default: T) -> dict[str, T]:
    """PEFT's rank_pattern or alpha_pattern: the values that differ from the default.

    `values` are by module. A key is a module's last component if all modules that end in it have the same
    value, else the full path.
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
