"""Reads the factors of single experts out of those that PEFT stores for all experts (see `stacked`)."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from torch import Tensor

from svdconvert.adapters.adapter_config import AdapterConfig
from svdconvert.adapters.stacked import BASE_LAYER, registration_order
from svdconvert.checkpoint.parts import part_name
from svdconvert.checkpoint.tensors import REAL, TensorSource
from svdconvert.errors import ArtifactError

_WRAPPED = re.compile(rf"(?:{re.escape(BASE_LAYER)})*$")
_KEPT = 4  # factors of all experts that stay in memory: those of gate_up and down, before and after training
_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert among those whose factors share tensors."""

    number: int
    count: int
    rank: int


Names = Mapping[str, Mapping[str, str]]
"""Module -> factor -> name in the file."""


def find_experts(
    file: Path, config: AdapterConfig, source: TensorSource, modules: Names
) -> tuple[dict[str, Mapping[str, str]], dict[str, Expert]]:
    """(module -> factor -> name, module -> expert), with a module `PARAMETER[3]` for each expert of a stack.

    `modules` are those of the keys. Raises ArtifactError if the parameter or the number of experts of
    factors is not clear, or if their shapes contradict each other.
    """
    by_path: dict[str, list[str]] = {}
    for module in modules:
        by_path.setdefault(_WRAPPED.sub("", module), []).append(module)
    found: dict[str, Mapping[str, str]] = {}
    experts: dict[str, Expert] = {}
    for path, wrapped in by_path.items():
        parameters = _parameters(file, config, path, wrapped)
        if not parameters:
            found[path] = modules[path]
        for module, parameter in zip(sorted(wrapped, key=len), parameters, strict=False):
            names = modules[module]
            rank = config.rank_of(parameter.removesuffix(".weight"))
            count = _count(file, source, names, rank)
            if parameter.endswith(".weight") and count == 1:
                found[path] = names
                continue
            for number in range(count):
                found[part_name(parameter, number)] = names
                experts[part_name(parameter, number)] = Expert(number, count, rank)
    return found, experts


def _parameters(file: Path, config: AdapterConfig, path: str, wrapped: list[str]) -> list[str]:
    """The parameters of the module `path` whose factors have these keys, the outermost wrapper first.

    Empty for a module that is adapted as a whole.
    """
    named = {
        f"{path}.{target.rpartition('.')[2]}"
        for target in config.parameters
        if config.names_parameter(f"{path}.{target.rpartition('.')[2]}")
    }
    if not named and wrapped == [path]:
        return []
    order = registration_order(name.rpartition(".")[2] for name in named)
    if len(order) != len(wrapped):
        raise ArtifactError(
            f"{file} has {len(wrapped)} adapters of {path}, but target_parameters names {len(order)} of its "
            "parameters; restore the configuration that belongs to the file"
        )
    return [f"{path}.{name}" for name in reversed(order)]


def _count(file: Path, source: TensorSource, names: Mapping[str, str], rank: int) -> int:
    """The number of experts whose factors of rank `rank` are in these tensors."""
    if absent := {"lora_A", "lora_B"} - names.keys():
        raise ArtifactError(f"{file} has {min(names.values())} without a {min(absent)}; restore the file")
    infos = {factor: source.infos[name] for factor, name in names.items()}
    if unreal := [info for info in infos.values() if info.dtype not in REAL]:
        raise ArtifactError(
            f"{file}: {unreal[0].name} is stored as {unreal[0].dtype}, and factors must be float32, "
            "bfloat16, float16 or float64; convert the adapter first"
        )
    rows = infos["lora_A"].shape[0] if infos["lora_A"].shape else 0
    sides = [infos[factor].shape for factor in ("lora_A", "lora_B")]
    flat = any(len(shape) != 2 or 0 in shape for shape in sides)  # noqa: PLR2004 (a matrix)
    cores = {"lora_S": (rows,), "lora_R": (rows, rank)}
    odd = [info for factor, info in infos.items() if cores.get(factor, info.shape) != info.shape]
    if flat or sides[1][1] != rows or rows % rank or rows // rank > _MOST_EXPERTS or odd:
        shapes = ", ".join(f"{info.name} {info.shape}" for info in infos.values())
        raise ArtifactError(
            f"{file}: {shapes} are no factors of experts at rank {rank}; restore the configuration that "
            "belongs to the file"
        )
    return rows // rank


@dataclass
class Slices:
    """Slices of factors that all experts share; the last few whole factors stay in memory."""

    read: Callable[[str], Tensor]
    """Reads, and checks, the tensor with this name in the file."""
    _kept: dict[str, Tensor] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def piece(self, factor: str, name: str, expert: Expert) -> Tensor:
        """The factor of one expert, contiguous."""
        whole = self._whole(name)
        if factor == "lora_B":
            return whole.reshape(whole.shape[0], expert.rank, expert.count)[:, :, expert.number].contiguous()
        first = expert.number * expert.rank
        return whole[first : first + expert.rank].clone()

    def _whole(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._kept:
                if len(self._kept) == _KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[name] = self.read(name)
            return self._kept[name]


def piece_shape(factor: str, shape: tuple[int, ...], expert: Expert) -> tuple[int, ...]:
    """The shape of one expert's factor, from that of the factor of all experts."""
    return (shape[0], expert.rank) if factor == "lora_B" else (expert.rank, *shape[1:])
