"""A checkpoint under other names: the tensors of a source, renamed and rearranged by rules.

A checkpoint of one layout becomes one of another through the family's canonical names.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from svdconvert.checkpoint.rename_rules import RenameRule, rules_for_canonical, rules_for_layout
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


@dataclass(frozen=True)
class _Recipe:
    """How one tensor is made from tensors of the source."""

    names: tuple[str, ...]
    make: "Callable[[Sequence[Tensor]], Tensor] | None"
    """None if the tensor is the source's, only under another name."""


class RenamedSource:
    """A TensorSource that shows another source's tensors under other names and in other shapes."""

    def __init__(self, source: TensorSource, recipes: Mapping[str, _Recipe]) -> None:
        self._source = source
        self._recipes = recipes
        self.infos: Mapping[str, TensorInfo] = {name: self._info(name) for name in recipes}

    def _info(self, name: str) -> TensorInfo:
        import torch

        recipe = self._recipes[name]
        infos = [self._source.infos[inner] for inner in recipe.names]
        if recipe.make is None:
            return replace(infos[0], name=name)
        # The shape is found by running the operations on tensors without data.
        shapes = [torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta") for info in infos]
        try:
            made = recipe.make(shapes)
        except (RuntimeError, IndexError) as error:
            given = ", ".join(f"{info.name} {info.shape}" for info in infos)
            raise CheckpointError(
                f"{given} cannot be read as {name}: {' '.join(str(error).split())}; restore the checkpoint"
            ) from error
        return TensorInfo(name, tuple(made.shape), dtype_code(made.dtype))

    def read(self, name: str) -> "Tensor":
        """The tensor, in memory that nothing else uses."""
        recipe = self._recipes[name]
        tensors = [self._source.read(inner) for inner in recipe.names]
        return tensors[0] if recipe.make is None else recipe.make(tensors).contiguous()

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`.

        A tensor that is only renamed is never in memory as a whole.
        """
        recipe = self._recipes[name]
        if recipe.make is None:
            return self._source.chunks(recipe.names[0], size, buffer, section)
        return in_chunks(tensor_bytes(self.read(name))[section or slice(None)], size, buffer)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Those of the source."""
        return self._source.file_versions()


def as_family(source: TensorSource, rules: Sequence[RenameRule], place: str) -> RenamedSource:
    """The tensors of a layout's checkpoint under the canonical names of its family.

    `place` names the checkpoint in errors. Raises CheckpointError if a tensor is missing, or if there is
    one without a rule.
    """
    expanded = rules_for_layout(source.infos, rules)
    recipes = {
        name: _Recipe((rule.name,), rule.to_canonical and _part(rule.to_canonical, index))
        for rule in expanded
        if rule.name in source.infos
        for index, name in enumerate(rule.canonical)
    }
    missing = [rule.name for rule in expanded if rule.name not in source.infos and not rule.optional]
    if missing:
        raise CheckpointError(
            f"{place} has no {missing[0]} ({len(missing)} such tensors); fetch the whole checkpoint"
        )
    _refuse_unknown(source, {rule.name for rule in expanded}, place, "no tensor of this family of models")
    return RenamedSource(source, recipes)


def with_zeros(source: RenamedSource, infos: Iterable[TensorInfo]) -> RenamedSource:
    """The tensors of a source, and zeros for those of `infos` that it lacks."""
    added = {info.name: _Recipe((), _zeros(info)) for info in infos if info.name not in source.infos}
    return RenamedSource(source, {name: _Recipe((name,), None) for name in source.infos} | added)


def _zeros(info: TensorInfo) -> "Callable[[Sequence[Tensor]], Tensor]":
    import torch

    return lambda _: torch.zeros(info.shape, dtype=torch_dtype(info.dtype))


def as_layout(family: TensorSource, rules: Sequence[RenameRule], layout: str) -> RenamedSource:
    """The tensors under canonical names as those of a layout, in the order of its rules.

    Raises CheckpointError for a tensor that the layout cannot hold.
    """
    expanded = [
        rule
        for rule in rules_for_canonical(family.infos, rules)
        if all(name in family.infos for name in rule.canonical)
    ]
    known = {name for rule in expanded for name in rule.canonical}
    _refuse_unknown(family, known, layout, "which this layout has no place for; take another --layout")
    return RenamedSource(family, {rule.name: _Recipe(rule.canonical, rule.to_layout) for rule in expanded})


def _part(
    to_canonical: "Callable[[Tensor], Sequence[Tensor]]", index: int
) -> "Callable[[Sequence[Tensor]], Tensor]":
    return lambda tensors: to_canonical(tensors[0])[index]


def _refuse_unknown(source: TensorSource, known: set[str], place: str, why: str) -> None:
    if unknown := [name for name in source.infos if name not in known]:
        raise CheckpointError(f"{place}: {unknown[0]} is {why} ({len(unknown)} such)")
