"""What a model family calls its matrices: as tensors in its files, and as modules at run time.

A layout is data. `roles` maps a role ("attn.q") to the pattern of its tensors' names in the files, with
{layer} in place of the layer's number and {expert} in place of an expert's. A pattern that ends in [{expert}]
is one expert of a stacked tensor. `modules` lists how the module paths at run time differ from the names in
the files, and `experts` how experts are stored there, if they are.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from svdconvert.checkpoint.parts import part_name, whole_name, with_parts
from svdconvert.checkpoint.rename_rules import RenameRule, rule_of
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.errors import TargetError, did_you_mean
from svdconvert.layouts.experts import Experts
from svdconvert.manifest.place import Place, Rows
from svdconvert.models.roles import TOWERS
from svdconvert.plugins import Registry

ALL_LINEAR = "all-linear"
AUTOMATIC = "auto"
"""The name of the layout that is found from the network of transformers."""
BY_NAMES = "names"
"""The name of the layout that is inferred from the tensors' names."""
_WRAPPERS = ("_orig_mod.", "module.")
_NUMBER = re.compile(r"\\\{(layer|expert)\\\}")  # {layer}, as re.escape returns it
_STACKED = 3  # axes of a tensor with the matrices of all experts
_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Slot:
    """One matrix of a model."""

    name: str
    """Of its tensor in the files, or of its part of a tensor, such as `NAME[3]`."""
    role: str
    layer: int
    module: str
    """The path at run time of the module whose weight it is; for an expert, the path that the module would
    have if every expert were a module of its own."""
    expert: int | None = None
    """The number of its expert, in a mixture of experts."""
    place: Place | None = None
    """Which part of which parameter it is at run time; None if it is the weight of `module`."""


@dataclass(frozen=True)
class Layout:
    """A family of checkpoints whose matrices have the same names."""

    model_types: frozenset[str]
    """Values of config.json's model_type; empty if tensor names decide."""
    roles: Mapping[str, str | tuple[str, ...]]
    """Role -> pattern of tensor names in the files, or several patterns; only weights of linear layers in the
    repeated blocks.

    A pattern with {expert} is one expert of a mixture. Two roles must not match the same name. A pattern may
    begin with `prefix` or not.
    """
    experts: Experts | None = None
    """Set if a role is that of experts."""
    modules: Sequence[tuple[str, str]] = ()
    """(prefix in the files, prefix at run time): the first that fits is replaced."""
    prefix: str = ""
    """Precedes the names of the body in a checkpoint with a head, but not in one of the body alone."""
    task: str | None = "CAUSAL_LM"
    """PEFT's name of what the models do; None if that depends on the head, as with encoders."""
    summary: str = ""
    """One line for `svdconvert list layouts`."""
    signature_tensor: str | None = None
    """A tensor that only checkpoints of this layout have. It takes precedence over config.json."""
    known_unsupported: Sequence["KnownUnsupported"] = ()
    """Models that could be mistaken for this layout, and are refused by name."""
    family: "LayoutFamily | None" = None
    """Set if several layouts hold the same tensors and `convert` goes from one to another."""

    limits_ranks: bool = False
    """True if matrices that are narrower than the rank are adapted with the highest rank that they have,
    unless all are narrower; otherwise they are refused."""
    fan_in_fan_out: bool = False
    """True if linear layers of the network have their weights as (in, out), as GPT-2's."""

    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the layout, one sentence each."""
        return ()

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        before = f"(?:{re.escape(self.prefix)})?"
        return [
            (role, re.compile(before + _numbered(pattern.removeprefix(self.prefix))))
            for role, patterns in self.roles.items()
            for pattern in ((patterns,) if isinstance(patterns, str) else patterns)
        ]

    def task_of(self, names: Iterable[str]) -> str | None:
        """PEFT's task_type for a checkpoint with these tensors; None for a body without its head."""
        has_head = not self.prefix or any(name.startswith(self.prefix) for name in names)
        return self.task if has_head else None

    def slot(self, name: str) -> Slot | None:
        """The slot of the tensor `name`; None for embeddings, heads, norms and biases."""
        for role, pattern in self._patterns:
            if match := pattern.fullmatch(name):
                expert = match.groupdict().get("expert")
                if expert is None:
                    return Slot(name, role, int(match["layer"]), self.module(name))
                return self._expert_slot(name, role, int(match["layer"]), int(expert))
        return None

    def _expert_slot(self, name: str, role: str, layer: int, expert: int) -> Slot:
        assert self.experts is not None, f"{role} is a role of experts, and the layout has no `experts`"
        module, place = self.experts.place(self.module(whole_name(name)), expert, name)
        return Slot(name, role, layer, module, expert, place)

    def divided(self, source: TensorSource) -> TensorSource:
        """The source, with stacked tensors divided into the matrices that have slots."""
        return with_parts(source, self.parts(source.infos))

    def parts(self, infos: Mapping[str, TensorInfo]) -> list[str]:
        """The names of the parts into which this layout divides tensors; a part is a single expert."""
        return [
            part_name(info.name, expert)
            for info in infos.values()
            if len(info.shape) == _STACKED and self.slot(part_name(info.name, 0)) is not None
            for expert in range(min(info.shape[0], _MOST_EXPERTS))
        ]

    def module(self, name: str) -> str:
        """The path at run time of the module whose weight the tensor `name` is."""
        path = name.removesuffix(".weight")
        for in_files, at_run_time in self.modules:
            if path.startswith(in_files):
                return at_run_time + path[len(in_files) :]
        return path

    def modules_of(self, name: str) -> Sequence[str]:
        """The paths at run time of the modules whose weights the tensor `name` has something of."""
        return (self.module(name),)

    def runtime_name(self, name: str) -> str:
        """The name at run time of the parameter that is the tensor `name` in the files."""
        return self.module(name) + (".weight" if name.endswith(".weight") else "")

    def network_path(self, name: str) -> str:
        """The path, in the network that is trained, of the module whose weight the tensor `name` is.

        Differs from `module` only for families whose network is svdconvert's own.
        """
        slot = self.slot(name)
        assert slot is not None, name
        return self.family.network_path(slot.role, slot.layer) if self.family else slot.module

    def rename_rule(self, parameter: str) -> RenameRule:
        """How a parameter, given by its name at run time, is made from those of the network."""
        if self.family is not None:
            return rule_of(parameter, self.family.rules)
        return RenameRule((parameter,), parameter)

    def slots(self, infos: Mapping[str, TensorInfo]) -> dict[str, Slot]:
        """Every matrix of a checkpoint that this layout knows, in the checkpoint's order.

        `infos` are the tensors of a source that is `divided`.
        """
        found = ((name, self.slot(name)) for name in infos)
        slots = {name: slot for name, slot in found if slot is not None}
        return {name: replace(slot, place=_with_rows(slot, infos[name])) for name, slot in slots.items()}

    def select(self, infos: Mapping[str, TensorInfo], targets: Sequence[str]) -> dict[str, Slot]:
        """The slots that at least one of `targets` matches, in the checkpoint's order.

        A target is "all-linear" (without the towers of models that see or hear), a role or its first part
        ("attn.q", "mlp", "vision"), a glob on tensor names or, as in PEFT, the end of a module's path
        ("q_proj"). A name that is both is a role.
        Raises TargetError if one of them matches nothing.
        """
        slots = self.slots(infos)
        if not slots:
            raise TargetError(self.without_slots(infos))
        selected: set[str] = set()
        for target in targets:
            names = {name for name, slot in slots.items() if _matches(target, slot)}
            names = names or {name for name, slot in slots.items() if _ends_with(target, slot)}
            if not names:
                raise TargetError(self._no_match(target, infos))
            selected |= names
        return {name: slot for name, slot in slots.items() if name in selected}

    def without_slots(self, infos: Iterable[str]) -> str:
        """Why a checkpoint without a matrix of this layout has none, and what to do."""
        for prefix in _WRAPPERS:
            if any(name.startswith(prefix) and self.slot(name.removeprefix(prefix)) for name in infos):
                return (
                    f"the names of its tensors have the prefix {prefix} of a wrapper such as torch.compile "
                    "or DistributedDataParallel; save the model without the wrapper, or rename its tensors"
                )
        return "no tensor of the checkpoint has a name of this layout; give another --layout"

    def _no_match(self, target: str, infos: Iterable[str]) -> str:
        others = [name for name in infos if fnmatchcase(name, target)]
        if others:
            return (
                f"target {target!r} matches only tensors that are never decomposed, such as {others[0]} "
                "(embeddings, heads, norms and biases are copied); choose other --targets"
            )
        if target == ALL_LINEAR:
            reasons = "".join(f"; {remark}" for remark in self.remarks())
            return f"no matrix of the language model can be adapted; give --targets vision or audio{reasons}"
        groups = {role.split(".")[0] for role in self.roles}
        modules = {slot.module.rpartition(".")[2] for name in infos if (slot := self.slot(name)) is not None}
        return (
            f"target {target!r} matches no matrix; give {ALL_LINEAR}, a glob on tensor names, or a role or a "
            f"module's name ({did_you_mean(target, {*self.roles, *groups, *modules})})"
        )


def _ends_with(target: str, slot: Slot) -> bool:
    """True if the module's path, at run time or in the files, ends in `target`: PEFT's rule."""
    paths = (slot.module, slot.name.removesuffix(".weight"))
    return any(path == target or path.endswith(f".{target}") for path in paths)


def _with_rows(slot: Slot, info: TensorInfo) -> Place | None:
    """The place of a slot with the number of its rows, which only the tensor's header tells."""
    if slot.place is None or slot.place.rows is None or slot.place.rows.size:
        return slot.place
    count = info.shape[0]
    return replace(slot.place, rows=Rows(slot.place.rows.first * count, count))


def _numbered(pattern: str) -> str:
    """The regular expression of a pattern, with groups for its numbers."""
    return _NUMBER.sub(r"(?P<\1>[0-9]{1,6})", re.escape(pattern))


def _matches(target: str, slot: Slot) -> bool:
    role = slot.role == target or slot.role.startswith(target + ".")
    if target == ALL_LINEAR:
        return slot.role.split(".")[0] not in TOWERS
    return role or fnmatchcase(slot.name, target)


@dataclass(frozen=True, slots=True)
class KnownUnsupported:
    """A model that the layout does not cover, recognised by names of its tensors."""

    title: str
    """What it is, with its article: "an RWKV-5"."""
    present: tuple[str, ...]
    """Names that it has."""
    absent: tuple[str, ...] = ()
    """Names that it lacks, if `present` alone does not identify it."""


@dataclass(frozen=True)
class LayoutFamily:
    """What makes a layout one of several of the same models."""

    name: str
    """The family's; the module of `svdconvert.models` with this name loads its network and tokenizer."""
    network_path: Callable[[str, int], str]
    """(role, layer) -> the path of the module in that network."""
    rules: Sequence[RenameRule]
    """From the family's canonical names to the layout's, in the order of the layout's files."""
    states: Callable[[Mapping[str, TensorInfo]], Sequence[TensorInfo]] | None = None
    """The initial states that a model of the family may have; None if its layers have no state."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Words of `train --train-also` -> patterns of canonical names."""
    file: str | None = None
    """The only file of a plain checkpoint, such as model.pth; None for safetensors in shards."""
    config: Callable[[TensorSource], dict[str, Any]] | None = None
    """Makes config.json from the family's tensors; None if readers of the layout need none."""
    loading: str = ""
    """The expression that loads a plain checkpoint, with {path} in place of its directory."""
    advice: str = ""
    """What a user who converts to this layout has to know."""


LAYOUTS: Registry[Layout] = Registry(
    "svdconvert.layouts",
    "LAYOUT",
    Layout,
    shared=("automatic", "automatic_cache", "base", "blocks", "by_names", "detect", "experts", "loading"),
)
