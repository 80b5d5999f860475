"""One matrix of a quantised stack, such as one expert of a layer, as a quantised weight of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.parts import index_of, part_name, whole_name
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.quantization.base import Coded, Parts, StorageFormat

if TYPE_CHECKING:
    from torch import Tensor

Found = tuple[StorageFormat, Coded]


def one_of_stack(coded: Mapping[str, Found], name: str) -> Found | None:
    """The quantised matrix `NAME[3]`, if the stack NAME is stored index by index; its parts are parts too."""
    index = index_of(name)
    plugin, stack = coded.get(whole_name(name), (None, None))
    if plugin is None or stack is None or index is None or not stack.by_rows:
        return None
    parts = {part: part_name(stored, index) for part, stored in stack.parts.items()}
    return OneOfStack(plugin), replace(stack, name=name, shape=stack.shape[1:], parts=parts, by_rows=False)


class OneOfStack(StorageFormat):
    """Decodes and encodes a matrix as a stack of one."""

    summary = "one matrix of a stack"
    methods = frozenset()

    def __init__(self, plugin: StorageFormat) -> None:
        """`plugin` is the format of the stack."""
        self._plugin = plugin
        self.encodes = plugin.encodes  # type: ignore[misc]

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Nothing: the format of the stack finds the stack."""
        return iter(())

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> "Tensor":
        """The rows of the only matrix."""
        return self._plugin.decode(_stack(coded), _stacked(parts), slice(0, 1))[0, rows]

    def encode(self, coded: Coded, weight: "Tensor", parts: Parts) -> dict[str, "Tensor"]:
        """By the rule of the stack's format."""
        made = self._plugin.encode(_stack(coded), weight[None], _stacked(parts))
        return {part: tensor[0] for part, tensor in made.items()}

    def title(self, coded: Coded) -> str:
        """That of the stack."""
        return self._plugin.title(_stack(coded))


def _stack(coded: Coded) -> Coded:
    return replace(coded, shape=(1, *coded.shape))


def _stacked(parts: Parts) -> Parts:
    return {part: tensor[None] for part, tensor in parts.items()}
