"""Factors of all experts of a layer in one tensor, as PEFT stores those of a fused parameter.

E: experts, R: rank, O: out features, I: in features. For a parameter (E, O, I) or (E, I, O) of a module,
PEFT's ParamWrapper has A as (E * R, I), expert after expert, and B as (O, R * E), in which the experts of one
column of B are next to each other: the change of expert e is scale * B.view(O, R, E)[:, :, e] @
A.view(E, R, I)[e]. If several parameters of a module are adapted, their wrappers are nested in the order in
which the module registers them: the last one has the module's own path, each one before it is one
`base_layer` deeper. (peft/tuners/lora/layer.py, class ParamWrapper, of PEFT 0.21)

A matrix that several stored matrices make up, such as gate and up of an expert, has their factors side by
side: A = [A0; A1], B = [[B0, 0], [0, B1]].
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.adapters.extra_parameters import PREFIX
from svdconvert.checkpoint.parts import index_of, part_name, whole_name
from svdconvert.checkpoint.tensors import TensorInfo, torch_dtype
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.place import Rows

BASE_LAYER = ".base_layer"
_BLOCK = 32 << 20  # bytes of B that are put together at a time

Read = Callable[[str, str, slice], Tensor]
"""(module, factor, rows) -> these rows of the factor."""


@dataclass(frozen=True, slots=True)
class Member:
    """One low-rank matrix among those of a stack."""

    module: str
    """The name of its factors."""
    expert: int
    rows: Rows | None
    """Its rows in the expert's matrix; None if it is all of it."""
    rank: int
    offset: int = 0
    """Its first row among those of the expert's A."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The factors of all experts of one parameter, or of one matrix that several stored matrices make up."""

    parameter: str
    """The path of the parameter at run time."""
    experts: int | None
    """The number of experts; None for a matrix that belongs to no expert."""
    rank: int
    """R, the same for all experts; smaller ranks are padded with zeros."""
    shape: tuple[int, int]
    """(out features, in features) of one expert."""
    members: tuple[Member, ...]
    depth: int = 0
    """The number of wrappers of the same module around this one."""
    core: str | None = None
    """The factor between A and B, lora_S or lora_R, if there is one."""

    @property
    def module(self) -> str:
        """The path of the module in the adapter's file."""
        return self.parameter.rpartition(".")[0] + BASE_LAYER * self.depth

    @property
    def modules(self) -> list[str]:
        """The names that the experts' factors have when the file is read."""
        if self.experts is None:
            return [self.parameter.removesuffix(".weight")]
        return [part_name(self.parameter, expert) for expert in range(self.experts)]

    def key(self, factor: str) -> str:
        """The name of a factor in the adapter's file."""
        return f"{PREFIX}{self.module}.{factor}.weight"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each factor."""
        rows = (self.experts or 1) * self.rank
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (rows, self.shape[1]),
            "lora_B": (self.shape[0], rows),
        }
        cores: dict[str, tuple[int, ...]] = {"lora_S": (rows,), "lora_R": (rows, self.rank)}
        return shapes | {name: shape for name, shape in cores.items() if name == self.core}

    def infos(self, dtype: str) -> list[TensorInfo]:
        """The headers of its tensors in the adapter's file."""
        return [TensorInfo(self.key(factor), shape, dtype) for factor, shape in self.shapes().items()]

    def blocks(self, factor: str, read: Read, dtype: str) -> Iterator[Tensor]:
        """Consecutive rows of a factor; no more than one expert's, or 32 MiB of B, are in memory."""
        if factor == "lora_B":
            return self._blocks_of_left(read, torch_dtype(dtype))
        return self._experts(factor, read, torch_dtype(dtype))

    def _experts(self, factor: str, read: Read, dtype: torch.dtype) -> Iterator[Tensor]:
        by_expert: dict[int, list[Member]] = {}
        for member in self.members:
            by_expert.setdefault(member.expert, []).append(member)
        width = {"lora_A": self.shape[1:], "lora_S": (), "lora_R": (self.rank,)}[factor]
        for expert in range(self.experts or 1):
            block = torch.zeros(self.rank, *width, dtype=dtype)
            for member in by_expert.get(expert, ()):
                place = slice(member.offset, member.offset + member.rank)
                index = (place, place) if factor == "lora_R" else (place,)
                block[index] = read(member.module, factor, slice(None))
            yield block

    def _blocks_of_left(self, read: Read, dtype: torch.dtype) -> Iterator[Tensor]:
        rows, _ = self.shape
        count = self.experts or 1
        step = max(1, _BLOCK // (self.rank * count * dtype.itemsize))
        for first in range(0, rows, step):
            last = min(rows, first + step)
            block_ORE = torch.zeros(last - first, self.rank, count, dtype=dtype)
            for member in self.members:
                into, out_of = _overlap(member.rows or Rows(0, rows), first, last)
                if out_of.start < out_of.stop:
                    columns = slice(member.offset, member.offset + member.rank)
                    block_ORE[into, columns, member.expert] = read(member.module, "lora_B", out_of)
            yield block_ORE.reshape(last - first, -1)


def _overlap(rows: Rows, first: int, last: int) -> tuple[slice, slice]:
    """(place of a member's rows in the block from `first` to `last`, these rows of the member)."""
    begin = max(0, -((rows.first - first) // rows.step))
    end = max(begin, min(rows.size, -((rows.first - last) // rows.step)))
    start = rows.first + begin * rows.step - first
    return slice(start, start + (end - begin) * rows.step, rows.step), slice(begin, end)


def stacks_of(modules: Mapping[str, tuple[int, int, int]], core: str | None = None) -> list[Stack]:
    """The stacks of modules called `PARAMETER[3]`, given the (out features, in features, rank) of each.

    All experts of a parameter must be among them. Other modules are ignored.
    """
    by_parameter: dict[str, list[str]] = {}
    for module in modules:
        if index_of(module) is not None:
            by_parameter.setdefault(whole_name(module), []).append(module)
    stacks = []
    for parameter, names in by_parameter.items():
        rank = max(modules[name][2] for name in names)
        members = tuple(Member(name, index_of(name) or 0, None, modules[name][2]) for name in names)
        rows, columns, _ = modules[names[0]]
        depth = nesting_depth(parameter, by_parameter)
        stacks.append(Stack(parameter, len(names), rank, (rows, columns), members, depth, core))
    return stacks


def nesting_depth(parameter: str, adapted: Iterable[str]) -> int:
    """The number of wrappers around that of `parameter`: of adapted parameters that are registered later."""
    module, _, name = parameter.rpartition(".")
    names = {other.rpartition(".")[2] for other in adapted if other.rpartition(".")[0] == module}
    return len(names) - 1 - registration_order(names).index(name)


def registration_order(names: Iterable[str]) -> list[str]:
    """The names of a module's parameters in the order in which transformers registers them.

    A projection that widens comes before the one that narrows again, and a gate before what it multiplies.
    """
    return sorted({*names}, key=lambda name: (_is_last(name), "gate" not in name, name))


def _is_last(name: str) -> bool:
    return "down" in name or "output" in name or name in ("w2", "wo", "fc2")


def stack_factors(stack: Stack, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors of each of the stack's modules from those of its members, by module."""
    first = next(iter(factors.values()))
    shape = (stack.shape[0], stack.rank)
    found: dict[str, Factors] = {}
    for expert, module in enumerate(stack.modules):
        left_OR = first.left_OR.new_zeros(shape)
        right_RI = first.right_RI.new_zeros(stack.rank, stack.shape[1])
        core = None if first.core is None else first.core.new_zeros([stack.rank] * first.core.dim())
        for member in (one for one in stack.members if one.expert == expert):
            own = factors[member.module]
            place = slice(member.offset, member.offset + member.rank)
            left_OR[(member.rows or Rows(0, shape[0])).slice, place] = own.left_OR
            right_RI[place] = own.right_RI
            if core is not None and own.core is not None:
                core[(place,) * core.dim()] = own.core
        found[module] = Factors(left_OR, right_RI, core)
    return found
