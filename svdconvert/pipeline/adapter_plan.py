"""Which tensors of an adapter's file the factors of each matrix become, and the configuration that says so.

Experts are split one by one. Their factors are written into a temporary file first, from which
`stack_experts` makes the tensors for all experts of a layer that PEFT loads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isclose

import torch
from torch import Tensor

from svdconvert.adapters.adapter_config import AdapterConfig
from svdconvert.adapters.peft_files import WEIGHTS, adapter_infos, key
from svdconvert.adapters.stacked import Member, Read, Stack, nesting_depth
from svdconvert.checkpoint.safetensors_files import open_file
from svdconvert.checkpoint.tensors import TensorInfo, dtype_code, read_rows, tensor_bytes
from svdconvert.errors import TargetError
from svdconvert.layouts.base import Slot
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.fingerprint import Checksum
from svdconvert.manifest.place import Place, Rows
from svdconvert.methods.base import init_folder
from svdconvert.output.plan import PlannedFile, plan_file
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.adapter_targets import Chosen, adapter_config, matrix_shape


@dataclass(frozen=True, slots=True)
class Piece:
    """Factors of one matrix, or of some of its rows, as one module of the adapter."""

    file: str
    module: str
    rows: Rows | None = None
    """Rows of B; None for all."""

    def of(self, factors: Factors) -> Factors:
        """The factors of its rows."""
        if self.rows is None:
            return factors
        return replace(factors, left_OR=factors.left_OR[self.rows.slice].contiguous())


@dataclass(frozen=True)
class AdapterPlan:
    """How the initial adapter is stored."""

    file: PlannedFile
    config: AdapterConfig
    pieces: Mapping[str, tuple[Piece, ...]]
    """Tensor of the model -> what its factors are written as."""
    stacks: tuple[Stack, ...] = ()
    """What the temporary file is put together to."""
    temporary: PlannedFile | None = None
    """The factors of single experts; None if none are stacked."""

    @property
    def files(self) -> list[PlannedFile]:
        """The adapter's file, and the temporary one."""
        return [self.file, *([self.temporary] if self.temporary else [])]


def plan_adapter(chosen: Chosen) -> AdapterPlan:
    """Plan the files and the configuration of the initial adapter.

    Raises TargetError if matrices that share a parameter have different scales, or if PEFT could not load
    what is asked for.
    """
    path = f"{init_folder(chosen.options.method)}/{WEIGHTS}"
    temporary = f"{init_folder(chosen.options.method)}/experts.safetensors"
    dtype = dtype_code(getattr(torch, chosen.options.dtype))
    stacks = plan_stacks(chosen)
    pieces: dict[str, tuple[Piece, ...]] = {}
    infos: dict[str, list[TensorInfo]] = {path: [], temporary: []}
    for name, slot in chosen.slots.items():
        rows, columns = chosen.shape(name)
        stacked = chosen.is_stacked(name)
        pieces[name] = _pieces(slot, rows, temporary if stacked else path, joint=stacked)
        for piece in pieces[name]:
            count = piece.rows.size if piece.rows else rows
            shapes = chosen.method.factor_shapes(count, columns, chosen.scalings[name].rank)
            infos[piece.file] += adapter_infos(piece.module, shapes, dtype)
    infos[path] += [info for stack in stacks for info in stack.infos(dtype)]
    file = plan_file(temporary, infos[temporary], "initial_adapter")
    modules = {name: [piece.module for piece in pieces[name]] for name in pieces}
    return AdapterPlan(
        file=plan_file(path, infos[path], "initial_adapter"),
        config=adapter_config(chosen, stacks, modules),
        pieces=pieces,
        stacks=tuple(stacks),
        temporary=replace(file, temporary=True) if stacks else None,
    )


def _pieces(slot: Slot, rows: int, file: str, *, joint: bool) -> tuple[Piece, ...]:
    """The modules that hold the factors of a slot: one, or one for each projection that it combines."""
    place = slot.place
    if joint or place is None or not place.projections:
        return (Piece(file, slot.module),)
    holder = slot.module.rpartition(".")[0]
    return tuple(
        Piece(file, f"{holder}.{name}", place.rows_of(number, rows))
        for number, name in enumerate(place.projections)
    )


def plan_stacks(chosen: Chosen) -> list[Stack]:
    """The stacks of the adapted matrices, with the modules of their slots as members."""
    every = chosen.layout.slots(chosen.infos)
    by_parameter: dict[str, list[str]] = {}
    for name in chosen.slots:
        if chosen.is_stacked(name):
            by_parameter.setdefault(_place(chosen.slots[name]).parameter, []).append(name)
    siblings: dict[str, list[Slot]] = {parameter: [] for parameter in by_parameter}
    for slot in every.values():
        if slot.place is not None and slot.place.parameter in siblings:
            siblings[slot.place.parameter].append(slot)
    return [
        _stack(chosen, parameter, names, siblings[parameter], nesting_depth(parameter, by_parameter))
        for parameter, names in by_parameter.items()
    ]


def _stack(chosen: Chosen, parameter: str, names: list[str], siblings: list[Slot], depth: int) -> Stack:
    """One stack; `siblings` are all slots of the parameter, also those that are not adapted."""
    scales = {name: chosen.scalings[name].scale for name in names}
    if odd := [name for name in names if not isclose(scales[name], scales[names[0]])]:
        raise TargetError(
            f"{names[0]} and {odd[0]} are one parameter at run time, and have the scales "
            f"{scales[names[0]]:g} and {scales[odd[0]]:g}; give both the same alpha / rank"
        )
    members: list[Member] = []
    used: dict[int, int] = {}
    for name in sorted(names, key=lambda name: (_expert(chosen.slots[name]), _first(chosen.slots[name]))):
        slot = chosen.slots[name]
        rank = chosen.scalings[name].rank
        offset = used.get(_expert(slot), 0)
        members.append(Member(slot.module, _expert(slot), _place(slot).rows, rank, offset))
        used[_expert(slot)] = offset + rank
    rows = max(_end(chosen, slot) for slot in siblings)
    has_experts = _place(siblings[0]).expert is not None
    return Stack(
        parameter=parameter,
        experts=1 + max(_expert(slot) for slot in siblings) if has_experts else None,
        rank=max(used.values()),
        shape=(rows, chosen.shape(names[0])[1]),
        members=tuple(members),
        depth=depth if has_experts else 0,
        core=next((name for name in ("lora_S", "lora_R") if name in chosen.method.trains), None),
    )


def _place(slot: Slot) -> Place:
    assert slot.place is not None, f"{slot.name} is no part of a parameter"
    return slot.place


def _expert(slot: Slot) -> int:
    return _place(slot).expert or 0


def _first(slot: Slot) -> int:
    rows = _place(slot).rows
    return rows.first if rows else 0


def _end(chosen: Chosen, slot: Slot) -> int:
    rows = _place(slot).rows
    return rows.first + rows.size if rows else matrix_shape(chosen.infos[slot.name], slot)[0]


def stack_experts(plan: AdapterPlan, staged: StagedOutput) -> None:
    """Write the tensors for all experts of each parameter, from the factors in the temporary file."""
    if plan.temporary is None:
        return
    source = open_file(staged.path / plan.temporary.path)
    dtype = plan.file.infos[0].dtype

    def read(module: str, factor: str, rows: slice) -> Tensor:
        return read_rows(source, key(module, factor), rows)

    for stack in plan.stacks:
        write_stack(staged, plan.file.path, stack, dtype, read)


def write_stack(staged: StagedOutput, file: str, stack: Stack, dtype: str, read: Read) -> None:
    """Write the tensors of a stack, each as an item of its own, without those that are finished."""
    for factor in stack.shapes():
        name = stack.key(factor)
        item = f"{file}: {name}"
        if item in staged.finished:
            continue
        total = Checksum()
        chunks = (tensor_bytes(block) for block in stack.blocks(factor, read, dtype))
        staged.write_bytes(file, name, chunks, total.update)
        staged.finish(item, {"files": {file: {name: total.text()}}})
