"""Which tensor goes into which file. The plan is made before the first byte is written."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from svdconvert.checkpoint.parts import joined, whole_name
from svdconvert.checkpoint.tensors import ELEMENTS, TensorInfo

FileRole = Literal["model", "adapter", "initial_adapter"]
"""What the tensors of a file are: the model's weights, or an adapter's after or before training."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of tensors."""

    path: str
    """Relative to the output directory."""
    infos: tuple[TensorInfo, ...]
    """Its tensors, in the order in which the file holds them."""
    role: FileRole = "model"
    parts: tuple[TensorInfo, ...] = ()
    """The parts in which some of the tensors are written; a tensor has all of its parts here, or none."""
    temporary: bool = False
    """True if the file is removed when the directory is complete."""
    metadata: tuple[tuple[str, str | float], ...] = ()
    """Of a GGUF file: key -> text or number."""

    @property
    def units(self) -> list[TensorInfo]:
        """What is written at a time: tensors, or their parts, in the order of the tensors."""
        by_whole: dict[str, list[TensorInfo]] = {}
        for part in self.parts:
            by_whole.setdefault(whole_name(part.name), []).append(part)
        return [unit for info in self.infos for unit in by_whole.get(info.name, [info])]

    @property
    def nbytes(self) -> int:
        """Size of the tensors' data in bytes, without the header."""
        return sum(info.nbytes for info in self.infos)


def plan_file(path: str, infos: Iterable[TensorInfo], role: FileRole = "model") -> PlannedFile:
    """One file: the widest element types first, so that all tensors are aligned, else in the given order."""
    return PlannedFile(path, tuple(sorted(infos, key=lambda info: -ELEMENTS[info.dtype][0])), role)


def plan_model(infos: Iterable[TensorInfo], limit: int, single: str | None = None) -> list[PlannedFile]:
    """The files of a checkpoint: one called `single` if that is given, else shards of at most `limit` bytes.

    A .pth keeps the given order, because a state dict is ordered.
    """
    if single is None:
        return plan_shards(infos, limit)
    return [PlannedFile(single, tuple(infos)) if single.endswith(".pth") else plan_file(single, infos)]


def plan_divided(
    units: Sequence[TensorInfo],
    wholes: Mapping[str, TensorInfo],
    limit: int,
    stored_as: Callable[[TensorInfo], Sequence[TensorInfo]] | None = None,
) -> list[PlannedFile]:
    """`plan_shards` for tensors of which some are given, and will be written, as their parts.

    `wholes` has the shapes of the undivided tensors. `stored_as` says which tensors of one shard an undivided
    tensor is stored as. Raises CheckpointError if the parts of one tensor differ in their element type.
    """
    by_whole: dict[str, list[TensorInfo]] = {}
    for unit in units:
        if unit.name not in wholes and whole_name(unit.name) in wholes:
            by_whole.setdefault(whole_name(unit.name), []).append(unit)
    whole_infos = joined(units, wholes)
    groups = ((info,) if stored_as is None else stored_as(info) for info in whole_infos)
    files = plan_groups(groups, limit)
    return [
        replace(file, parts=tuple(part for info in file.infos for part in by_whole.get(info.name, ())))
        for file in files
    ]


def plan_shards(infos: Iterable[TensorInfo], limit: int) -> list[PlannedFile]:
    """Fill shards of at most `limit` bytes in the given order; a larger tensor is alone in a shard.

    A single shard is called model.safetensors, several model-00001-of-0000N.safetensors.
    """
    return plan_groups(((info,) for info in infos), limit)


def plan_groups(groups: Iterable[Sequence[TensorInfo]], limit: int) -> list[PlannedFile]:
    """As `plan_shards`; the tensors of a group are in the same shard."""
    shards: list[list[TensorInfo]] = [[]]
    left = limit
    for group in groups:
        nbytes = sum(info.nbytes for info in group)
        if shards[-1] and nbytes > left:
            shards.append([])
            left = limit
        shards[-1] += group
        left -= nbytes
    if len(shards) == 1:
        return [plan_file("model.safetensors", shards[0])]
    count = len(shards)
    return [plan_file(f"model-{n:05}-of-{count:05}.safetensors", shard) for n, shard in enumerate(shards, 1)]


def index_text(files: Sequence[PlannedFile]) -> str:
    """The content of model.safetensors.index.json."""
    weight_map = {info.name: file.path for file in files for info in file.infos}
    total = sum(file.nbytes for file in files)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
        + "\n"
    )
