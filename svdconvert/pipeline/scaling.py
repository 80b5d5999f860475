"""Rank and scale of every adapted matrix: computed from the options, written to adapter_config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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

    def at_rank(self, rank: int) -> "Scaling":
        """The same scale at another rank."""
        times = rank / self.rank
        return replace(self, rank=rank, alpha=self.alpha * (sqrt(times) if self.rslora else times))


def scalings(
    layout: Layout, infos: Mapping[str, TensorInfo], slots: Mapping[str, Slot], options: SplitOptions
) -> dict[str, Scaling]:
    """Rank and alpha of the tensors in `slots`. Raises TargetError if a pattern matches none.

    If the layout limits ranks, a matrix that is narrower than the rank gets the highest rank that it has,
    with the same scale, unless a pattern names its rank or all matrices are narrower.
    """
    ranks = _values_by_tensor(layout, infos, slots, options.rank_pattern or {})
    alphas = _values_by_tensor(layout, infos, slots, options.alpha_pattern or {})
    found = {}
    for name in slots:
        rank = ranks.get(name, options.rank)
        found[name] = Scaling(rank, float(alphas.get(name, options.alpha or rank)), options.rslora)
    narrow = {name: min(infos[name].shape) for name in slots if min(infos[name].shape) < found[name].rank}
    if layout.limits_ranks and len(narrow) < len(slots):
        found |= {name: found[name].at_rank(rank) for name, rank in narrow.items() if name not in ranks}
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
