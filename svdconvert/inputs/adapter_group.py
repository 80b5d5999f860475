"""Several adapters of one base: which of their modules belong together, and what they need of the base."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.adapters.rwkv_peft import is_adapter_file
from svdconvert.errors import ArtifactError
from svdconvert.hub.download import fetch
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.init_evidence import refuse_hidden_init
from svdconvert.inputs.model import OpenModel, find_model
from svdconvert.inputs.open_adapter import open_adapter_delta
from svdconvert.inputs.recover_init import recover_init, settle_init
from svdconvert.inputs.sources import Sources
from svdconvert.inputs.tensor_names import TensorNames, without_containers
from svdconvert.inputs.unused_sources import check_unused, refuse_idle_zero
from svdconvert.manifest.origin import base_conflict, same_model
from svdconvert.manifest.schema import has_manifest, read_manifest

_EXPERT = re.compile(r"\.experts\.[0-9]+\.")


@dataclass(frozen=True)
class AdapterGroup:
    """Several adapters of one base."""

    deltas: tuple[AdapterDelta, ...]
    base: OpenModel | None = None
    """Open if a parameter that was trained in full needs it."""

    @cached_property
    def modules(self) -> Mapping[str, Mapping[int, str]]:
        """Module -> position of an adapter -> its own name of the module.

        Names that differ only in the modules that contain a model's body are one module, which is called as
        the first adapter calls it.
        """
        spellings: dict[str, str] = {}
        found: dict[str, dict[int, str]] = {}
        for index, delta in enumerate(self.deltas):
            for module in delta.modules:
                name = spellings.setdefault(without_containers(module), module)
                found.setdefault(name, {})[index] = module
        return found

    @cached_property
    def parameters(self) -> Mapping[str, Mapping[int, str]]:
        """The same for the parameters that were trained in full."""
        spellings: dict[str, str] = {}
        found: dict[str, dict[int, str]] = {}
        for index, delta in enumerate(self.deltas):
            for parameter in delta.adapter.extras:
                name = spellings.setdefault(without_containers(parameter), parameter)
                found.setdefault(name, {})[index] = parameter
        return found

    @property
    def directories(self) -> list[Path]:
        """Those of the adapters, in their order."""
        return [delta.directory for delta in self.deltas]

    @property
    def has_one_spelling(self) -> bool:
        """True if all adapters call each module the same."""
        return all(name == own for name, each in self.modules.items() for own in each.values())

    def shape(self, module: str) -> tuple[int, int]:
        """(O, I) of a module."""
        index, own = next(iter(self.modules[module].items()))
        return _shape(self.deltas[index], own)

    def rank(self, index: int, module: str) -> int:
        """An upper bound of the rank of what an adapter changes in a module; 0 if it does not have it."""
        own = self.modules[module].get(index)
        if own is None:
            return 0
        delta = self.deltas[index]
        rank = delta.adapter.shape(own, "lora_A")[0]
        return rank if _starts_at_zero(delta) else 2 * rank

    def trained_parameter(self, name: str) -> dict[int, Tensor]:
        """Position of an adapter -> its value of a parameter trained in full, in float32."""
        return {
            index: self.deltas[index].parameter(own).float() for index, own in self.parameters[name].items()
        }

    def is_agreed(self, name: str) -> bool:
        """True if every adapter has a parameter, and all have the same values."""
        first, *others = self.trained_parameter(name).values()
        return len(others) + 1 == len(self.deltas) and all(torch.equal(first, other) for other in others)

    def base_parameter(self, name: str) -> Tensor:
        """The base's value of a parameter, in float32. Raises ArtifactError if it has none."""
        assert self.base is not None
        _, layout = self.base.layout(self.deltas[0].layout_name)
        tensor = TensorNames(layout, self.base.source.infos).tensor(name)
        if tensor is None:
            raise ArtifactError(
                f"{self.base.path} has no {name}, which an adapter trained in full: a new part is combined "
                "only if all adapters have the same; merge each adapter on its own"
            )
        return self.base.source.read(tensor).float()


def open_group(adapters: Sequence[str], sources: Sources, alpha: float | None = None) -> AdapterGroup:
    """Open adapters, each with its start settled, and check that they fit together.

    The base is opened if parameters that were trained in full differ between the adapters. `alpha` is that of
    files which do not state it. Raises ArtifactError if they are not of one base, or if the base is needed
    and missing.
    """
    deltas = _open_each(adapters, sources, alpha)
    refuse_idle_zero(deltas, sources)
    sources = replace(sources, init=None)
    own = replace(sources, base=None, residual=None)
    needs_base = [delta.is_lost or delta.is_assumed_zero for delta in deltas]
    settled = [
        settle_init(delta, sources if needed else own)
        for delta, needed in zip(deltas, needs_base, strict=True)
    ]
    group = AdapterGroup(tuple(settled))
    _refuse_misfits(group)
    _refuse_mixed_forms(group)
    if differing := [name for name in group.parameters if not group.is_agreed(name)]:
        return replace(group, base=_needed_base(group, differing[0], sources))
    if sources.base and not any([*needs_base, *(delta.uses_base for delta in deltas)]):
        check_unused(settled[0], sources, base_used=False)
    return group


def open_group_on_base(adapters: Sequence[str], sources: Sources, alpha: float | None = None) -> AdapterGroup:
    """Open adapters and the base that they are merged into, each with its start settled.

    `alpha` is that of files which do not state it. Raises ArtifactError if the base is not found, or if an
    adapter belongs to another one.
    """
    deltas = _open_each(adapters, sources, alpha)
    refuse_idle_zero(deltas, sources)
    origins = [delta.manifest.base for delta in deltas if delta.manifest and delta.manifest.base]
    base = find_model(
        origins[0] if origins else None,
        sources.base,
        stream=sources.stream,
        trust_remote_code=sources.trust_remote_code,
    )
    if base is None:
        raise ArtifactError(
            f"the base of {deltas[0].directory} is not found; several adapters, or one with a weight, are "
            "merged into their base: give it with --base"
        )
    for origin in origins:
        same_model(origin, base.path, base.config, base.source)
    for delta in deltas:
        refuse_hidden_init(delta, base)
    settled = tuple(recover_init(delta, sources, base) for delta in deltas)
    group = AdapterGroup(settled, base)
    _refuse_misfits(group)
    return group


def _open_each(adapters: Sequence[str], sources: Sources, alpha: float | None) -> list[AdapterDelta]:
    """All adapters: those whose start is not recorded on the given residual.

    Raises ArtifactError for a residual or an alpha that no adapter needs.
    """
    deltas = []
    takes_alpha = False
    takes_residual = False
    alone = replace(sources, residual=None)
    for adapter in adapters:
        path = fetch(adapter, "adapter").path
        own = alpha if is_adapter_file(path) else None
        is_ours = path.is_dir() and has_manifest(path) and read_manifest(path).kind != "decomposed"
        delta = open_adapter_delta(adapter, sources if is_ours else alone, own)
        takes_residual = takes_residual or (is_ours and delta.residual is not None)
        if sources.residual and not is_ours and (delta.is_lost or delta.is_assumed_zero):
            delta = open_adapter_delta(adapter, sources, own)
            takes_residual = True
        if delta.adapter.config.dora:
            raise ArtifactError(
                f"{delta.directory} is a DoRA adapter, whose magnitudes no LoRA can express exactly; merge "
                "it alone, or approximate it first with to-lora --rank"
            )
        takes_alpha = takes_alpha or own is not None
        deltas.append(delta)
    if alpha is not None and not takes_alpha:
        raise ArtifactError("--alpha changes nothing here: every adapter states its own; leave it out")
    if sources.residual and not takes_residual:
        raise ArtifactError(
            f"--residual {sources.residual} changes nothing here: the start of every adapter is recorded; "
            "leave it out"
        )
    return deltas


def _starts_at_zero(delta: AdapterDelta) -> bool:
    return delta.initial_adapter is None and delta.recovered is None


def _needed_base(group: AdapterGroup, name: str, sources: Sources) -> OpenModel:
    origins = [delta.manifest.base for delta in group.deltas if delta.manifest and delta.manifest.base]
    found = find_model(
        origins[0] if origins else None, sources.base, trust_remote_code=sources.trust_remote_code
    )
    if found is None:
        raise ArtifactError(
            f"not all adapters trained {name} in full, or with different values, which are combined as "
            "changes of their base: give it with --base"
        )
    return found


def _refuse_mixed_forms(group: AdapterGroup) -> None:
    """Raise ArtifactError for factors that one combined LoRA cannot hold together."""
    fused = [delta for delta in group.deltas if delta.adapter.experts]
    single = [delta for delta in group.deltas if any(_EXPERT.search(one) for one in delta.modules)]
    if fused and single:
        raise ArtifactError(
            f"{fused[0].directory} has the factors of all experts of a layer in one tensor, and "
            f"{single[0].directory} those of each expert: write both in one form, with to-lora"
        )
    for delta in group.deltas:
        if delta.adapter.embeddings:
            raise ArtifactError(
                f"{delta.directory} adapts the embeddings {min(delta.adapter.embeddings)}, which are not "
                "combined; merge the adapters into their base"
            )


def _refuse_misfits(group: AdapterGroup) -> None:
    """Raise ArtifactError if the adapters belong to different models or tasks."""
    for module, each in group.modules.items():
        shapes = {_shape(group.deltas[index], own): index for index, own in each.items()}
        if len(shapes) > 1:
            (one, owner), (other, other_owner), *_ = shapes.items()
            raise ArtifactError(
                f"{group.deltas[owner].directory} adapts {module} as {one}, and "
                f"{group.deltas[other_owner].directory} as {other}: they belong to different models"
            )
    first = group.deltas[0]
    for delta in group.deltas[1:]:
        if conflict := base_conflict(first.manifest, delta.manifest):
            raise ArtifactError(
                f"{first.directory} and {delta.directory} belong to different bases: {conflict}; combine "
                "adapters of one base"
            )
        if first.adapter.config.task != delta.adapter.config.task and None not in (
            first.adapter.config.task,
            delta.adapter.config.task,
        ):
            raise ArtifactError(
                f"{first.directory} is for the task {first.adapter.config.task}, and {delta.directory} for "
                f"{delta.adapter.config.task}; combine adapters of one task"
            )
        if (first.manifest and first.manifest.head) != (delta.manifest and delta.manifest.head):
            raise ArtifactError(
                f"{first.directory} and {delta.directory} have different heads for classification; merge "
                "each on its own"
            )


def _shape(delta: AdapterDelta, module: str) -> tuple[int, int]:
    return delta.adapter.shape(module, "lora_B")[0], delta.adapter.shape(module, "lora_A")[1]
