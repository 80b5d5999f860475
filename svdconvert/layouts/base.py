"""What a model family calls its matrices: on disk, and as modules at run time.

A layout is data. `roles` maps a role ("attn.q") to the pattern of its tensors' names on disk, with
{layer} where the layer's number stands and {expert} where an expert's does; `modules` rewrites a name
on disk into the path of the module at run time where the two differ.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.renamed import RenameRule, rule_of
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.errors import CheckpointError, TargetError, UnknownNameError, did_you_mean
from svdconvert.output.sidecars import CONFIG, read_config
from svdconvert.plugins import Registry

ALL_LINEAR = "all-linear"
_NUMBER = re.compile(r"\\\{(layer|expert)\\\}")  # as re.escape leaves {layer}


@dataclass(frozen=True, slots=True)
class Slot:
    """One matrix of a model: its tensor on disk, its role, its layer and its module at run time."""

    name: str
    role: str
    layer: int
    module: str
    expert: int | None = None
    """Number of the expert, in a mixture of them."""


@dataclass(frozen=True)
class Layout:
    """A family of checkpoints whose matrices have the same names."""

    model_types: frozenset[str]
    """Values of config.json's model_type; none where tensor names decide."""
    roles: Mapping[str, str]
    """Role -> pattern of tensor names on disk; only Linear weights of the repeated layers."""
    modules: Sequence[tuple[str, str]] = ()
    """(prefix on disk, prefix at run time): the first that fits is replaced."""
    prefix: str = ""
    """What comes before every name in the checkpoint of a whole model, and not in that of its body alone."""
    task: str | None = "CAUSAL_LM"
    """What PEFT calls the models' task; None where that depends on the head."""
    summary: str = ""
    """One line for `svdconvert list layouts`."""
    signature: str | None = None
    """A tensor that only checkpoints of this layout have: it decides, whatever config.json says."""
    known_unsupported: Sequence["KnownUnsupported"] = ()
    """Models that could be taken for it, and are refused by name."""
    family: "LayoutFamily | None" = None
    """Where several layouts hold the same tensors, as `convert` has them; None for a layout on its own."""

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        before = f"(?:{re.escape(self.prefix)})?"
        return [
            (role, re.compile(before + _NUMBER.sub(r"(?P<\1>\\d+)", re.escape(pattern))))
            for role, pattern in self.roles.items()
        ]

    def slot(self, name: str) -> Slot | None:
        """The slot that the tensor `name` fills, None for embeddings, heads, norms and biases."""
        for role, pattern in self._patterns:
            if match := pattern.fullmatch(name):
                expert = match.groupdict().get("expert")
                return Slot(
                    name, role, int(match["layer"]), self.module(name), int(expert) if expert else None
                )
        return None

    def module(self, name: str) -> str:
        """The run-time path of the module whose weight the tensor `name` is."""
        path = name.removesuffix(".weight")
        for disk, runtime in self.modules:
            if path.startswith(disk):
                return runtime + path[len(disk) :]
        return path

    def parameter(self, name: str) -> str:
        """The run-time path of the parameter that the tensor `name` is."""
        return self.module(name) + (".weight" if name.endswith(".weight") else "")

    def path(self, name: str) -> str:
        """Where the network that is trained has the module whose weight the tensor `name` is."""
        slot = self.slot(name)
        assert slot is not None, name
        return self.family.path(slot.role, slot.layer) if self.family else slot.module

    def held(self, parameter: str) -> RenameRule:
        """What a parameter, by its run-time path, is made of in the network that is trained."""
        if self.family is not None:
            return rule_of(parameter, self.family.rules)
        return RenameRule((parameter,), parameter)

    def slots(self, infos: Mapping[str, TensorInfo]) -> dict[str, Slot]:
        """Every matrix of a checkpoint that this layout knows, in the checkpoint's order."""
        found = ((name, self.slot(name)) for name in infos)
        return {name: slot for name, slot in found if slot is not None}

    def select(self, infos: Mapping[str, TensorInfo], targets: Sequence[str]) -> dict[str, Slot]:
        """The slots that any of `targets` names, in the checkpoint's order.

        A target is "all-linear", a role or the first part of one ("attn.q", "mlp"), or a glob on
        tensor names. Raises TargetError where one of them matches nothing.
        """
        slots = self.slots(infos)
        if not slots:
            raise TargetError("no tensor of the checkpoint has a name of this layout; give another --layout")
        wanted: set[str] = set()
        for target in targets:
            names = {name for name, slot in slots.items() if _names(target, slot)}
            if not names:
                raise TargetError(self._no_match(target, infos))
            wanted |= names
        return {name: slot for name, slot in slots.items() if name in wanted}

    def _no_match(self, target: str, infos: Iterable[str]) -> str:
        others = [name for name in infos if fnmatchcase(name, target)]
        if others:
            return (
                f"target {target!r} matches only tensors that are never decomposed, such as {others[0]} "
                "(embeddings, heads, norms and biases leave as they are)"
            )
        groups = {role.split(".")[0] for role in self.roles}
        return (
            f"target {target!r} matches no matrix; give {ALL_LINEAR}, a glob on tensor names, or a role "
            f"({did_you_mean(target, {*self.roles, *groups})})"
        )


def _names(target: str, slot: Slot) -> bool:
    role = slot.role == target or slot.role.startswith(target + ".")
    return target == ALL_LINEAR or role or fnmatchcase(slot.name, target)


@dataclass(frozen=True, slots=True)
class KnownUnsupported:
    """A model that is not of the layout, recognised by names of its tensors."""

    title: str
    present: tuple[str, ...]
    absent: tuple[str, ...] = ()
    """Names that it lacks, where `present` alone does not tell."""


@dataclass(frozen=True)
class LayoutFamily:
    """A layout as one of several of the same models."""

    name: str
    """The family's; `svdconvert.models` has a module of this name, which loads its network and tokenizer."""
    path: Callable[[str, int], str]
    """(role, layer) -> the path of the module in its network."""
    rules: Sequence[RenameRule]
    """From the family's own names to the layout's, in the order in which its files have them."""
    states: Callable[[Mapping[str, TensorInfo]], Sequence[TensorInfo]] | None = None
    """The first states that a model of the family may have; None where its layers have no state."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Words of `train --train-also` -> patterns of the family's names."""
    file: str | None = None
    """The one file of a plain checkpoint, such as model.pth; None for safetensors in shards."""
    config: Callable[[TensorSource], dict[str, Any]] | None = None
    """Makes config.json from the family's tensors; None where readers want none."""
    loading: str = ""
    """How a program loads a plain checkpoint, with {path} for its directory."""
    advice: str = ""
    """What a user who converts to this layout has to know."""


LAYOUTS: Registry[Layout] = Registry("svdconvert.layouts", "LAYOUT", "layout")


def find_layout(
    name: str | None, model_type: str | None, directory: str, infos: Container[str] = ()
) -> tuple[str, Layout]:
    """The layout called `name`, else by the tensors `infos`, else by config.json's `model_type`; its name.

    Raises UnknownNameError where there is none, CheckpointError for a model that is none of ours.
    """
    if name is not None:
        return name, LAYOUTS.get(name)
    known = {name: LAYOUTS.get(name) for name in LAYOUTS.names()}
    _refuse_relatives(known.values(), infos, directory)
    for found, layout in known.items():
        if layout.signature in infos:
            return found, layout
    for found, layout in known.items():
        if model_type in layout.model_types:
            return found, layout
    types = sorted(kind for layout in known.values() for kind in layout.model_types)
    raise UnknownNameError(
        f"{directory} has the model type {model_type!r}, which no layout covers "
        f"({did_you_mean(str(model_type), types)}); if its tensors are named as in {', '.join(known)}, "
        "say so with --layout"
    )


CAUSAL = "AutoModelForCausalLM"
_AUTO_CLASSES = {
    "ForCausalLM": CAUSAL,
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads the first architecture of a config.json."""
    architecture = str((config.get("architectures") or [""])[0])
    return next((name for end, name in _AUTO_CLASSES.items() if architecture.endswith(end)), "AutoModel")


def loading(name: str, path: object) -> str:
    """How a program loads the plain checkpoint at `path`, of the layout `name`; empty where none can."""
    if family := _family(name):
        return family.loading.format(path=path)
    place = Path(str(path))
    kind = auto_class(read_config(place)) if (place / CONFIG).is_file() else CAUSAL
    return f'{kind}.from_pretrained("{path}")'


def is_transformers(name: str) -> bool:
    """True where transformers, and so PEFT, loads models of the layout `name`."""
    family = _family(name)
    return family is None or "AutoModel" in family.loading


def _family(name: str) -> LayoutFamily | None:
    return LAYOUTS.get(name).family if name in LAYOUTS.names() else None


def in_family(name: str, layout: Layout, wanted: str) -> tuple[str, Layout]:
    """The layout `wanted` beside `layout`, with its name; the family's own may be left out of the name.

    Raises UnknownNameError where `layout` has no such neighbour.
    """
    family = layout.family.name if layout.family else ""
    known = {
        other: found
        for other, found in ((other, LAYOUTS.get(other)) for other in LAYOUTS.names())
        if found.family and found.family.name == family
    }
    if not known:
        raise UnknownNameError(f"a model of the layout {name} has no other layouts to be converted to")
    full = wanted if wanted in known else f"{family}-{wanted}"
    if full not in known:
        short = [other.removeprefix(f"{family}-") for other in known]
        raise UnknownNameError(
            f"a model of the layout {name} has no layout {wanted!r}; {did_you_mean(wanted, short)}"
        )
    return full, known[full]


def has_signature_tensor(infos: Container[str]) -> bool:
    """True where the names of its tensors alone tell a checkpoint's layout, or that it has none."""
    known = [LAYOUTS.get(name) for name in LAYOUTS.names()]
    return any(
        layout.signature in infos or any(_is(kin, infos) for kin in layout.known_unsupported)
        for layout in known
    )


def _refuse_relatives(known: Iterable[Layout], infos: Container[str], directory: str) -> None:
    for layout in known:
        for relative in layout.known_unsupported:
            if _is(relative, infos):
                raise CheckpointError(
                    f"{directory} is {relative.title} (it has {relative.present[0]}): no layout covers it; "
                    f"give a model of this kind: {layout.summary}"
                )


def _is(relative: KnownUnsupported, infos: Container[str]) -> bool:
    return all(name in infos for name in relative.present) and not any(
        name in infos for name in relative.absent
    )


def attention(prefix: str = "model") -> dict[str, str]:
    """The roles of self-attention under the names that Llama gave them."""
    layer = f"{prefix}.layers.{{layer}}"
    return {f"attn.{part}": f"{layer}.self_attn.{part}_proj.weight" for part in ("q", "k", "v", "o")}


def gated_decoder(prefix: str = "model") -> dict[str, str]:
    """The roles of a decoder with a gated feed-forward block under the names that Llama gave them."""
    layer = f"{prefix}.layers.{{layer}}"
    feed_forward = {f"mlp.{part}": f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    return attention(prefix) | feed_forward


def encoder() -> dict[str, str]:
    """The roles of an encoder under the names that BERT gave them."""
    layer = "encoder.layer.{layer}"
    return {
        "attn.q": f"{layer}.attention.self.query.weight",
        "attn.k": f"{layer}.attention.self.key.weight",
        "attn.v": f"{layer}.attention.self.value.weight",
        "attn.o": f"{layer}.attention.output.dense.weight",
        "mlp.up": f"{layer}.intermediate.dense.weight",
        "mlp.down": f"{layer}.output.dense.weight",
    }
