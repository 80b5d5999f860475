"""One family's tensors under the names of several layouts: rules that run both ways.

A family has names of its own, and every layout of it has one rule for each of its tensors, which says
what family tensors it holds and how. Going from one layout to another is going to the family's own
names and on. Nothing is computed but views and permutations, so nothing is lost.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from svdconvert.checkpoint.tensors import (
    TensorInfo,
    TensorSource,
    dtype_code,
    in_chunks,
    tensor_bytes,
    torch_dtype,
)
from svdconvert.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = "{layer}"


@dataclass(frozen=True)
class RenameRule:
    """One tensor of a layout, and the family's tensors that it holds; {layer} stands for a number."""

    own: tuple[str, ...]
    """Names in the family."""
    name: str
    """Name in the layout."""
    pack: "Callable[[Sequence[Tensor]], Tensor] | None" = None
    """Family's tensors -> the layout's; None leaves the one tensor as it is."""
    unpack: "Callable[[Tensor], Sequence[Tensor]] | None" = None
    """The inverse."""
    first_only: bool = False
    """Only the first layer has it."""
    optional: bool = False
    """A checkpoint may be without it."""

    def at(self, layer: int) -> "RenameRule":
        """The rule for one layer."""
        number = str(layer)
        own = tuple(name.replace(_LAYER, number) for name in self.own)
        return replace(self, own=own, name=self.name.replace(_LAYER, number))


@dataclass(frozen=True)
class _Part:
    """How one tensor of a view is made from tensors of the source."""

    names: tuple[str, ...]
    make: "Callable[[Sequence[Tensor]], Tensor] | None"


class RenamedSource:
    """A TensorSource that shows another one's tensors under other names and in other shapes."""

    def __init__(self, source: TensorSource, parts: Mapping[str, _Part]) -> None:
        self._source, self._parts = source, parts
        self.infos: Mapping[str, TensorInfo] = {name: self._info(name) for name in parts}

    def _info(self, name: str) -> TensorInfo:
        import torch

        part = self._parts[name]
        infos = [self._source.infos[inner] for inner in part.names]
        if part.make is None:
            return replace(infos[0], name=name)
        # Shapes follow from the very operations, on tensors without data.
        shapes = [torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta") for info in infos]
        try:
            made = part.make(shapes)
        except (RuntimeError, IndexError) as error:
            given = ", ".join(f"{info.name} {info.shape}" for info in infos)
            raise CheckpointError(
                f"{given} cannot be read as {name}: {' '.join(str(error).split())}; restore the checkpoint"
            ) from error
        return TensorInfo(name, tuple(made.shape), dtype_code(made.dtype))

    def read(self, name: str) -> "Tensor":
        """The tensor in memory of its own."""
        part = self._parts[name]
        tensors = [self._source.read(inner) for inner in part.names]
        return tensors[0] if part.make is None else part.make(tensors).contiguous()

    def chunks(self, name: str, size: int, buffer: memoryview | None = None) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`; what is only renamed is never whole in memory."""
        part = self._parts[name]
        if part.make is None:
            return self._source.chunks(part.names[0], size, buffer)
        return in_chunks(tensor_bytes(self.read(name)), size, buffer)

    def file_versions(self) -> Mapping[str, list[int]]:
        """That of the source."""
        return self._source.file_versions()


def as_family(source: TensorSource, rules: Sequence[RenameRule], place: str) -> RenamedSource:
    """The tensors of a layout's checkpoint under the family's own names.

    Raises CheckpointError where one is missing, or is there and in no rule.
    """
    expanded = list(_expanded(rules, _layers(source.infos, [rule.name for rule in rules])))
    parts = {
        name: _Part((rule.name,), rule.unpack and _taking(rule.unpack, index))
        for rule in expanded
        if rule.name in source.infos
        for index, name in enumerate(rule.own)
    }
    lost = [rule.name for rule in expanded if rule.name not in source.infos and not rule.optional]
    if lost:
        raise CheckpointError(
            f"{place} has no {lost[0]} ({len(lost)} such tensors); fetch the whole checkpoint"
        )
    _refuse_unknown(source, {rule.name for rule in expanded}, place, "no tensor of this family of models")
    return RenamedSource(source, parts)


def with_zeros(source: RenamedSource, infos: Iterable[TensorInfo]) -> RenamedSource:
    """The tensors of a view, and zeros for those of `infos` that it does not have."""
    added = {info.name: _Part((), _zeros(info)) for info in infos if info.name not in source.infos}
    return RenamedSource(source, {name: _Part((name,), None) for name in source.infos} | added)


def _zeros(info: TensorInfo) -> "Callable[[Sequence[Tensor]], Tensor]":
    import torch

    return lambda _: torch.zeros(info.shape, dtype=torch_dtype(info.dtype))


def as_layout(family: TensorSource, rules: Sequence[RenameRule], layout: str) -> RenamedSource:
    """The tensors of a family under the names of a layout, in the order of its rules.

    Raises CheckpointError for a tensor that the layout has no place for.
    """
    expanded = [
        rule
        for rule in _expanded(rules, _layers(family.infos, [name for rule in rules for name in rule.own]))
        if all(name in family.infos for name in rule.own)
    ]
    known = {name for rule in expanded for name in rule.own}
    _refuse_unknown(family, known, layout, "which this layout has no place for; take another --layout")
    return RenamedSource(family, {rule.name: _Part(rule.own, rule.pack) for rule in expanded})


def rule_of(name: str, rules: Sequence[RenameRule]) -> RenameRule:
    """The rule for the layout's tensor `name`, for its layer. There is one."""
    for rule in rules:
        if match := re.fullmatch(re.escape(rule.name).replace(re.escape(_LAYER), r"(\d+)"), name):
            return rule.at(int(match[1])) if match.groups() else rule
    raise KeyError(name)


def sort_by_rules(names: Iterable[str], rules: Sequence[RenameRule]) -> list[str]:
    """`names` of a layout in the order of its rules."""
    found = list(names)
    expanded = _expanded(rules, _layers(found, [rule.name for rule in rules]))
    place = {rule.name: number for number, rule in enumerate(expanded)}
    return sorted(found, key=lambda name: place.get(name, len(place)))


def _taking(
    unpack: "Callable[[Tensor], Sequence[Tensor]]", index: int
) -> "Callable[[Sequence[Tensor]], Tensor]":
    return lambda tensors: unpack(tensors[0])[index]


def _expanded(rules: Sequence[RenameRule], layers: int) -> Iterator[RenameRule]:
    """Every rule for every layer it is for: layer after layer, in the order of the rules."""
    inner = [rule for rule in rules if _LAYER in rule.name]
    for rule in rules:
        if _LAYER not in rule.name:
            yield rule
        elif rule is inner[0]:
            for layer in range(layers):
                yield from (each.at(layer) for each in inner if layer == 0 or not each.first_only)


def _layers(infos: Iterable[str], patterns: Sequence[str]) -> int:
    """Number of layers, by the highest number that stands where {layer} does."""
    prefixes = {re.escape(pattern.split(_LAYER)[0]) for pattern in patterns if _LAYER in pattern}
    number = re.compile(rf"(?:{'|'.join(prefixes)})(\d+)\.")
    return 1 + max((int(match[1]) for match in map(number.match, infos) if match), default=-1)


def _refuse_unknown(source: TensorSource, known: set[str], place: str, why: str) -> None:
    if odd := [name for name in source.infos if name not in known]:
        raise CheckpointError(f"{place}: {odd[0]} is {why} ({len(odd)} such)")
