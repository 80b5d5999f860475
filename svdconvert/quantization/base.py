"""How quantised weights are stored: each format is one file with a FORMAT, found by the file's name.

A format recognises its tensors by their names, element types and shapes, decodes them to float32 and, if its
rule for quantising needs nothing but the weights, encodes them again.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.errors import CheckpointError, TargetError
from svdconvert.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor

Parts = Mapping[str, "Tensor"]
"""The stored tensors of one quantised weight, by what they are to the format, such as "codes" and "scale"."""


@dataclass(frozen=True, slots=True)
class Coded:
    """One quantised weight as the headers describe it."""

    name: str
    """Of the decoded tensor: that of the weight in an unquantised checkpoint."""
    shape: tuple[int, ...]
    """Of the decoded tensor; at least one dimension."""
    parts: Mapping[str, str]
    """What a stored tensor is to the format -> its name in the files."""
    bits: int
    """Bits of a code."""
    unused: tuple[str, ...] = ()
    """Stored tensors that belong to the weight and on which its values do not depend, such as input_scale."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the format needs to know, such as the size of a block."""
    by_rows: bool = False
    """True if every part has the first dimension of the decoded tensor, and belongs to it index by index."""

    @property
    def stored(self) -> tuple[str, ...]:
        """All tensors of the files that the decoded tensor replaces."""
        return (*self.parts.values(), *self.unused)

    @property
    def count(self) -> int:
        """The number of decoded values."""
        return prod(self.shape)


class StorageFormat(ABC):
    """One way of storing quantised weights."""

    summary: ClassVar[str]
    """One line for `svdconvert list formats`."""
    methods: ClassVar[frozenset[str]]
    """Values of quant_method in config.json under which checkpoints have this format."""
    encodes: ClassVar[bool] = False
    """True if `encode` is the format's own rule, so that `merge --keep-format` can use it."""

    @abstractmethod
    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """The weights of a checkpoint that are stored in this format.

        `settings` is the quantization_config of config.json, {} without one; it comes from a file, so every
        entry may have any type. Only small tensors of `source` may be read. Raises CheckpointError if the
        shapes of a weight and its companions contradict each other.
        """

    @abstractmethod
    def decode(self, coded: Coded, parts: Parts, rows: slice) -> "Tensor":
        """The values in float32 at `rows` (start and stop given) of the decoded tensor's first dimension.

        The parts are complete, whatever the rows.
        """

    def encode(self, coded: Coded, weight: "Tensor", parts: Parts) -> dict[str, "Tensor"]:
        """The parts that hold `weight` (float32, of the decoded shape), quantised by the format's own rule.

        They have the names, shapes and element types of the stored `parts`. Raises TargetError if this
        format cannot be written.
        """
        raise TargetError(
            f"{coded.name} cannot be written in the format of its source, whose rule needs more than the "
            "weights; leave out --keep-format"
        )

    def title(self, coded: Coded) -> str:
        """The format of one weight, as users know it."""
        return self.summary.partition(":")[0]


def require_shape(info: TensorInfo, *allowed: tuple[int, ...]) -> None:
    """Raise CheckpointError if a companion has none of the shapes that fit its weight."""
    if info.shape not in allowed:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(allowed))
        raise CheckpointError(
            f"{info.name} has the shape {list(info.shape)}, and its weight needs {expected}; "
            "fetch the checkpoint again"
        )


def groups_of(info: TensorInfo, size: int) -> int:
    """The groups of `size` values in a row of a matrix with two values per byte.

    Raises CheckpointError if they do not divide it.
    """
    values = 2 * info.shape[1]
    if values % size:
        raise CheckpointError(
            f"{info.name} has rows of {values} values, which groups of {size} do not divide; fetch the "
            "checkpoint again"
        )
    return values // size


def per_row_of_blocks(grid: "Tensor", rows: slice, height: int) -> "Tensor":
    """For each of `rows` the row of `grid` that belongs to its block of `height` rows."""
    import torch

    return grid[torch.arange(rows.start, rows.stop) // height]


def weight_settings(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the groups of compressed-tensors' configuration say about weights."""
    groups = settings.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else []
    inner = [group.get("weights") for group in found if isinstance(group, Mapping)]
    return [weights for weights in inner if isinstance(weights, Mapping)]


FORMATS: Registry[StorageFormat] = Registry(
    "svdconvert.quantization",
    "FORMAT",
    StorageFormat,  # type: ignore[type-abstract]
    shared=("base", "nf4", "packing", "floats", "integers", "stacks", "view"),
)
"""The storage formats of quantised weights."""
