"""The layout of any model that transformers knows, found from its network.

The network is built without weights. Its linear layers and fused experts are the matrices, and transformers'
own tables for loading say which tensors of the files they are.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.parts import part_name
from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import CheckpointError
from svdconvert.layouts.base import Layout, Slot
from svdconvert.layouts.experts import Experts
from svdconvert.manifest.place import Place, Rows
from svdconvert.models.roles import expert_role, plain

if TYPE_CHECKING:
    from svdconvert.models.architecture import Architecture, Target
    from svdconvert.models.matrices import NetworkMatrix

_NUMBERS = re.compile(r"(?<![^.])[0-9]+(?![^.])|\[[0-9:]+\]$")
_MATRIX = 2  # axes
_SHOWN = 8


@dataclass(frozen=True)
class AutomaticLayout(Layout):
    """A layout with an entry for each matrix of one model."""

    table: Mapping[str, Slot] = field(default_factory=dict)
    """Tensor of the files, or part of one -> its slot."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Tensor of the files -> its parameter at run time, if one is the other under a different name."""
    rearranged: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Tensor of the files that is cut, permuted or put together -> the modules whose weights it goes into."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Matrix of the blocks without a role -> why it has none; "*" in place of numbers."""
    assumptions: tuple[str, ...] = ()
    """What was assumed because nothing tells it; one sentence each."""

    def slot(self, name: str) -> Slot | None:
        """The slot of the tensor or part `name`."""
        return self.table.get(name)

    def parts(self, infos: Mapping[str, TensorInfo]) -> list[str]:
        """The names of the parts into which this layout divides tensors."""
        return [name for name in self.table if name.endswith("]") and name not in infos]

    def module(self, name: str) -> str:
        """The path at run time of the module whose weight the tensor `name` is."""
        return self.runtime_name(name).removesuffix(".weight")

    def modules_of(self, name: str) -> Sequence[str]:
        """The paths at run time of the modules whose weights the tensor `name` has something of."""
        return self.rearranged.get(name) or (self.module(name),)

    def runtime_name(self, name: str) -> str:
        """The name at run time of the parameter that is the tensor `name` in the files."""
        return self.parameters.get(name, name)

    def remarks(self) -> tuple[str, ...]:
        """What was assumed, and which matrices of the blocks have no role."""
        if not self.left_out:
            return self.assumptions
        shown = ", ".join(f"{name} ({why})" for name, why in [*self.left_out.items()][:_SHOWN])
        return (
            *self.assumptions,
            f"matrices of the blocks that have no role and stay as they are: {shown} "
            f"({len(self.left_out)} such names)",
        )

    def task_of(self, names: Iterable[str]) -> str | None:
        """PEFT's task_type for the model."""
        return self.task


def automatic_layout(
    path: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], *, trust_remote_code: bool = False
) -> AutomaticLayout:
    """The layout of the checkpoint in `path` with the tensors `infos`.

    Raises CheckpointError if a tensor has no place in the network, or if the network cannot be built, and
    UnknownNameError if transformers does not know the model type.
    """
    from svdconvert.models.architecture import build_architecture, network_errors
    from svdconvert.models.matrices import find_matrices

    architecture = build_architecture(path, config, infos, trust_remote_code=trust_remote_code)
    with network_errors(path):
        found = find_matrices(architecture.network, architecture.output_heads())
        targets = architecture.targets(infos)
    _refuse_unexplained(path, architecture, infos, targets)
    lost = {one.parameter for one in found.known.values() if not architecture.peft_finds(one.module)}
    shared = architecture.shared_weights() & {*found.known}
    known = {name: one for name, one in found.known.items() if name not in lost | shared}
    left_out = {
        **dict.fromkeys(sorted(lost), "PEFT would not find its factors under its name"),
        **dict.fromkeys(sorted(shared), "several layers share it, and PEFT would adapt each of them"),
        **found.left_out,
    }
    table: dict[str, Slot] = {}
    for stored in _stored(infos, targets):
        for slot in _slots(stored, known, left_out):
            table[slot.name] = slot
    return AutomaticLayout(
        model_types=frozenset({str(config.get("model_type"))}),
        roles={slot.role: _pattern(slot) for slot in table.values()},
        experts=_experts(known.values(), targets.values(), fused_by_peft=architecture.peft_fuses_experts()),
        task=_task(architecture),
        limits_ranks=True,
        summary=f"{type(architecture.network).__name__} of transformers",
        table={name: table[name] for name in sorted(table, key=_order(infos))},
        parameters={name: target.parameter for name, target in targets.items() if not target.steps},
        rearranged={name: _modules(target) for name, target in targets.items() if target.steps},
        left_out={_starred(name): why for name, why in left_out.items()},
        fan_in_fan_out=any(one.transposed and not one.is_stacked for one in known.values()),
    )


def _refuse_unexplained(
    path: Path, architecture: "Architecture", infos: Mapping[str, TensorInfo], targets: Mapping[str, "Target"]
) -> None:
    unknown = [name for name in infos if name not in targets and not architecture.is_ignored(name)]
    if unknown:
        raise CheckpointError(
            f"{path} holds {unknown[0]}, which transformers' {type(architecture.network).__name__} does not "
            f"have ({len(unknown)} such tensors); restore config.json, or give --layout names to go by "
            "tensor names"
        )


def _experts(
    matrices: Iterable["NetworkMatrix"], targets: Iterable["Target"], *, fused_by_peft: bool
) -> Experts | None:
    """The parameters of experts, in the order in which their modules register them."""
    stacked = {_leaf(one.parameter): one for one in matrices if one.is_stacked}
    if not stacked:
        return None
    # The projections of experts that are stored one by one have the names of their tensors.
    apart = {
        _leaf(one.parameter): tuple(map(_leaf, one.sources))
        for one in targets
        if any(step.name == "MergeModulelist" for step in one.steps)
    }
    return Experts(
        parameters={name: apart.get(name) or _projections(name) or (name,) for name in stacked},
        transposed=any(one.transposed for one in stacked.values()),
        interleaved=any(one.interleaved for one in stacked.values()),
        fused_by_peft=fused_by_peft,
    )


def _leaf(path: str) -> str:
    """The last component of a path, without .weight; patterns of paths may have a backslash before dots."""
    return path.replace("\\", "").removesuffix(".weight").rpartition(".")[2]


def _projections(parameter: str) -> tuple[str, ...]:
    """The projections that a parameter combines; empty if it is one."""
    return ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ()


def _task(architecture: "Architecture") -> str | None:
    """PEFT's task_type; None for a body without a head, and for classifiers, whose heads are their own."""
    name = type(architecture.network).__name__
    if not architecture.output_heads() or "MaskedLM" in name or "PreTraining" in name:
        return None
    return "SEQ_2_SEQ_LM" if getattr(architecture.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _order(infos: Mapping[str, TensorInfo]) -> Any:
    """A key that sorts tensors and their parts as the files have them."""
    position = {name: number for number, name in enumerate(infos)}

    def key(name: str) -> tuple[int, int]:
        whole, _, rest = name.rpartition("[")
        if name in position:
            return position[name], 0
        return position[whole], int(re.split(r"[:\]]", rest)[0])

    return key


def _modules(target: "Target") -> list[str]:
    parameters = [target.parameter, *target.others]
    return [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]


def _starred(name: str) -> str:
    return _NUMBERS.sub("*", name)


def _pattern(slot: Slot) -> str:
    """The name of a slot's tensor with {layer} and {expert} in place of its numbers."""
    name = slot.name if slot.expert is None else slot.name.replace(f"[{slot.expert}]", "[{expert}]")
    return re.sub(rf"(?<![^.]){slot.layer}(?![^.])", "{layer}", name, count=1)


@dataclass(frozen=True)
class _Stored:
    """A tensor of the files, and what transformers makes of it and of its neighbours."""

    name: str
    shape: tuple[int, ...]
    target: "Target"
    alike: Mapping[str, Sequence[str]]
    """Pattern that takes part in the same operations -> the tensors that match it for the same parameter, in
    transformers' order."""
    infos: Mapping[str, TensorInfo]

    @property
    def expert(self) -> int:
        """The number of the expert, for a tensor that holds one expert."""
        return list(self.alike[self.target.source]).index(self.name)

    @property
    def rows(self) -> Rows:
        """Its rows in the parameter, or in an expert's matrix of it."""
        before = self.target.sources[: self.target.sources.index(self.target.source)]
        counts = [self.infos[names[0]].shape[-2] for source in before if (names := self.alike.get(source))]
        return Rows(sum(counts), self.shape[-2])


def _stored(infos: Mapping[str, TensorInfo], targets: Mapping[str, "Target"]) -> Iterator[_Stored]:
    groups: dict[str, dict[str, list[str]]] = {}
    for name, target in targets.items():
        groups.setdefault(target.parameter, {}).setdefault(target.source, []).append(name)
    for name, target in targets.items():
        yield _Stored(name, infos[name].shape, target, groups[target.parameter], infos)


def _slots(stored: _Stored, known: Mapping[str, "NetworkMatrix"], left_out: dict[str, str]) -> Iterator[Slot]:
    """The slots of one tensor of the files: none if it is no matrix that is adapted."""
    parameters = [stored.target.parameter, *stored.target.others]
    matrices = [known[parameter] for parameter in parameters if parameter in known]
    if not matrices:
        return
    try:
        if stored.target.others:
            yield from _cut(stored, parameters, matrices)
        elif matrices[0].is_stacked:
            yield from _of_experts(stored, matrices[0])
        else:
            yield _single(stored, matrices[0])
    except _UnknownArrangement as error:
        left_out[stored.name] = str(error)


class _UnknownArrangement(Exception):
    """A tensor is arranged in a way that is not understood."""


def _arrangement(stored: _Stored, matrix: "NetworkMatrix") -> tuple[bool, bool]:
    """(transposed in comparison with the parameter, one of several that are put below one another).

    Raises _UnknownArrangement.
    """
    axes = len(matrix.shape)
    transposed = False
    joined = False
    for step in stored.target.steps:
        if step.name == "MergeModulelist":
            continue
        if step.name == "Transpose" and sorted(axis % axes for axis in step.axes) == [axes - 2, axes - 1]:
            transposed ^= not (step.only_if_needed and stored.shape == matrix.shape)
        elif step.name == "Concatenate" and step.axes[0] % axes == axes - 2 and not transposed:
            joined = True
        else:
            raise _UnknownArrangement(f"its arrangement in the files ({step.name}) is not supported")
    return transposed, joined


def _single(stored: _Stored, matrix: "NetworkMatrix") -> Slot:
    """The slot of a matrix that is stored as a tensor, or as one of several put below one another."""
    transposed, joined = _arrangement(stored, matrix)
    transposed ^= matrix.transposed
    if len(stored.shape) != _MATRIX or not (joined or _same(stored.shape, matrix, transposed)):
        raise _UnknownArrangement(
            f"its shape in the files is {stored.shape}, and {matrix.shape} in the network"
        )
    if not joined:
        place = Place(parameter=matrix.parameter, transposed=True) if transposed else None
        return Slot(stored.name, matrix.role, matrix.layer, matrix.module, place=place)
    # Named like its tensor, so that each of the matrices that the module combines has a name of its own.
    leaf = _leaf(stored.name)
    return Slot(
        name=stored.name,
        role=f"{matrix.role.rpartition('.')[0]}.{plain(leaf)}",
        layer=matrix.layer,
        module=f"{matrix.module.rpartition('.')[0]}.{leaf}",
        place=Place(parameter=matrix.parameter, rows=stored.rows, transposed=transposed),
    )


def _same(shape: tuple[int, ...], matrix: "NetworkMatrix", transposed: bool) -> bool:
    expected = matrix.shape[::-1] if transposed != matrix.transposed else matrix.shape
    return shape == expected


def _cut(stored: _Stored, parameters: Sequence[str], matrices: Sequence["NetworkMatrix"]) -> Iterator[Slot]:
    """The slots of a tensor that is cut into the weights of several modules, from top to bottom."""
    names = {step.name for step in stored.target.steps}
    if not names <= {"Chunk", "Split"} or any(step.axes[0] not in (0, -2) for step in stored.target.steps):
        raise _UnknownArrangement(
            f"its arrangement in the files ({', '.join(sorted(names))}) is not supported"
        )
    whole = sum(matrix.shape[0] for matrix in matrices)
    if len(matrices) != len(parameters) or len(stored.shape) != _MATRIX or whole != stored.shape[0]:
        raise _UnknownArrangement("not all of what it holds are linear layers")
    first = 0
    for matrix in matrices:
        end = first + matrix.shape[0]
        yield Slot(part_name(stored.name, first, end), matrix.role, matrix.layer, matrix.module)
        first = end


def _of_experts(stored: _Stored, matrix: "NetworkMatrix") -> Iterator[Slot]:
    """The slots of the matrices of single experts."""
    transposed, joined = _arrangement(stored, matrix)
    leaf = _leaf(matrix.parameter)
    projections = _projections(leaf)
    if joined and not projections:
        raise _UnknownArrangement("it is put together from parts of unknown meaning")
    projection = projections[stored.target.sources.index(stored.target.source)] if joined else leaf
    apart = len(stored.shape) == _MATRIX
    names = [stored.name] if apart else [part_name(stored.name, number) for number in range(stored.shape[0])]
    for number, name in enumerate(names):
        expert = stored.expert if apart else number
        place = Place(
            parameter=matrix.parameter,
            expert=expert,
            rows=stored.rows if joined else None,
            transposed=transposed ^ matrix.transposed,
            projections=() if joined else projections,
            interleaved=matrix.interleaved and not joined and bool(projections),
        )
        yield Slot(
            name=name,
            role=expert_role(projection),
            layer=matrix.layer,
            module=name.removesuffix(".weight") if apart else f"{matrix.module}.{expert}.{projection}",
            expert=expert,
            place=place,
        )
