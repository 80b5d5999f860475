"""Which tensor goes into which file: a pure plan, made before the first byte is written."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from svdconvert.checkpoint.tensors import ELEMENTS, TensorInfo

FileRole = Literal["model", "adapter", "initial_adapter"]


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of tensors: its path below the output directory and its tensors, in file order."""

    path: str
    infos: tuple[TensorInfo, ...]
    role: FileRole = "model"

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(info.nbytes for info in self.infos)


def plan_file(path: str, infos: Iterable[TensorInfo], role: FileRole = "model") -> PlannedFile:
    """One file: the widest element types first, so that every tensor is aligned; otherwise as given."""
    return PlannedFile(path, tuple(sorted(infos, key=lambda info: -ELEMENTS[info.dtype][0])), role)


def plan_model(infos: Iterable[TensorInfo], limit: int, single: str | None = None) -> list[PlannedFile]:
    """The files of a plain checkpoint: the one called `single`, else shards of at most `limit` bytes.

    A .pth keeps the order given, which is part of it.
    """
    if single is None:
        return plan_shards(infos, limit)
    return [PlannedFile(single, tuple(infos)) if single.endswith(".pth") else plan_file(single, infos)]


def plan_shards(infos: Iterable[TensorInfo], limit: int) -> list[PlannedFile]:
    """Fill shards of at most `limit` bytes in the order given; a larger tensor has one of its own.

    One shard is called model.safetensors, several model-00001-of-0000N.safetensors.
    """
    groups: list[list[TensorInfo]] = [[]]
    room = limit
    for info in infos:
        if groups[-1] and info.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(info)
        room -= info.nbytes
    if len(groups) == 1:
        return [plan_file("model.safetensors", groups[0])]
    count = len(groups)
    return [plan_file(f"model-{n:05}-of-{count:05}.safetensors", group) for n, group in enumerate(groups, 1)]


def index_text(files: Sequence[PlannedFile]) -> str:
    """The text of model.safetensors.index.json for several shards."""
    weight_map = {info.name: file.path for file in files for info in file.infos}
    total = sum(file.nbytes for file in files)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
        + "\n"
    )
