"""Rules that rename tensors between a family's canonical names and the names of one of its layouts.

A family of models has canonical names for its tensors. Each of its layouts has a rule for every tensor in
its files, which says what canonical tensors it holds and in which arrangement. A rule works in both
directions, and is made of views and permutations only, so nothing is lost.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = "{layer}"


@dataclass(frozen=True)
class RenameRule:
    """One tensor of a layout, and the canonical tensors in it; {layer} stands for a layer's number."""

    canonical: tuple[str, ...]
    """Names in the family."""
    name: str
    """Name in the layout."""
    to_layout: "Callable[[Sequence[Tensor]], Tensor] | None" = None
    """Canonical tensors -> the layout's; None for the same values in the same shape."""
    to_canonical: "Callable[[Tensor], Sequence[Tensor]] | None" = None
    """The inverse."""
    first_only: bool = False
    """Only the first layer has it."""
    optional: bool = False
    """A checkpoint may lack it."""

    def at(self, layer: int) -> "RenameRule":
        """The rule for one layer."""
        number = str(layer)
        canonical = tuple(name.replace(_LAYER, number) for name in self.canonical)
        return replace(self, canonical=canonical, name=self.name.replace(_LAYER, number))


def rule_of(name: str, rules: Sequence[RenameRule]) -> RenameRule:
    """The rule for the layout's tensor `name`, for its layer. Raises KeyError if there is none."""
    for rule in rules:
        if match := re.fullmatch(re.escape(rule.name).replace(re.escape(_LAYER), r"([0-9]{1,6})"), name):
            return rule.at(int(match[1])) if match.groups() else rule
    raise KeyError(name)


def sort_by_rules(names: Iterable[str], rules: Sequence[RenameRule]) -> list[str]:
    """`names` of a layout in the order of its rules; those without a rule come last."""
    found = list(names)
    position = {rule.name: number for number, rule in enumerate(rules_for_layout(found, rules))}
    return sorted(found, key=lambda name: position.get(name, len(position)))


def rules_for_layout(names: Iterable[str], rules: Sequence[RenameRule]) -> list[RenameRule]:
    """The rules for every layer of a checkpoint whose tensors have the layout's `names`."""
    return list(_for_layers(rules, _layers(names, [rule.name for rule in rules])))


def rules_for_canonical(names: Iterable[str], rules: Sequence[RenameRule]) -> list[RenameRule]:
    """The rules for every layer of a checkpoint whose tensors have the canonical `names`."""
    patterns = [name for rule in rules for name in rule.canonical]
    return list(_for_layers(rules, _layers(names, patterns)))


def _for_layers(rules: Sequence[RenameRule], layers: int) -> Iterator[RenameRule]:
    """Every rule for every layer that it applies to: layer by layer, in the order of the rules."""
    per_layer = [rule for rule in rules if _LAYER in rule.name]
    for rule in rules:
        if _LAYER not in rule.name:
            yield rule
        elif rule is per_layer[0]:
            for layer in range(layers):
                yield from (each.at(layer) for each in per_layer if layer == 0 or not each.first_only)


def _layers(names: Iterable[str], patterns: Sequence[str]) -> int:
    """The number of layers, from the highest number in the place of {layer}.

    A number that is too high for so few names is left out: its layer cannot be complete.
    """
    prefixes = {re.escape(pattern.split(_LAYER)[0]) for pattern in patterns if _LAYER in pattern}
    number = re.compile(rf"(?:{'|'.join(prefixes)})([0-9]{{1,6}})\.")
    found = list(names)
    numbers = [int(match[1]) for match in map(number.match, found) if match]
    return 1 + max((layer for layer in numbers if layer < len(found)), default=-1)
