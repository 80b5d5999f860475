"""merge: several adapters, or one with a weight, are merged into their base with one rounding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorSource, dtype_code, torch_dtype
from svdconvert.checkpoint.values import cast_finite
from svdconvert.config.execution import Run
from svdconvert.config.options import MergeOptions
from svdconvert.errors import ArtifactError, RecipeError, TargetError
from svdconvert.inputs.adapted_tensors import adapted_tensors
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.adapter_group import AdapterGroup, open_group_on_base
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.sources import NO_INIT, Sources
from svdconvert.inputs.storage_format import refuse_codes
from svdconvert.inputs.tensor_names import Shares, TensorNames, joined_product
from svdconvert.linalg.delta import merged_
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.threads import parallel_matrices, pick_device
from svdconvert.manifest.results import MergeResult
from svdconvert.manifest.schema import Manifest, roles_of
from svdconvert.output.plan import PlannedFile
from svdconvert.output.sidecars import complete_checkpoint
from svdconvert.output.staging import StagedOutput
from svdconvert.output.tokenizer_files import copy_one_tokenizer, other_tokenizers
from svdconvert.pipeline.effects import refuse_idle_merge_options
from svdconvert.pipeline.lora_plan import exact_factors
from svdconvert.pipeline.merge import measured_update, remark_on_nothing, remark_on_rounding
from svdconvert.pipeline.merge_plan import Change, plan_files, refuse_shape
from svdconvert.pipeline.runner import (
    TensorJob,
    TensorResult,
    file_checksums,
    notes,
    source_checksums,
    stream,
)


@dataclass(frozen=True)
class GroupPlan:
    """What will be written, planned from headers alone."""

    group: AdapterGroup
    source: TensorSource
    """The base, divided as the layout has it."""
    options: MergeOptions
    weights: tuple[float, ...]
    """The factor of each adapter's change."""
    layout: str
    modules: Mapping[str, Sequence[tuple[int, Change]]]
    """Tensor -> (position of an adapter, how a module of it changes the tensor)."""
    extras: Mapping[str, str]
    """Tensor -> parameter that at least one adapter trained in full."""
    shards: tuple[PlannedFile, ...]
    dtypes: Mapping[str, str]
    """Element type of every tensor that is merged."""


def open_group_merge(adapters: Sequence[str], options: MergeOptions, sources: Sources) -> GroupPlan:
    """Open several adapters and their base, and plan the merge.

    Raises RecipeError for options and locations that are for one adapter.
    """
    if options.side == "residual":
        raise RecipeError(
            "several adapters, or one with a weight, are merged into their base; leave out --from residual"
        )
    if options.keep_format:
        raise RecipeError("--keep-format is for a single adapter; combine the adapters into one first")
    if sources.init not in (None, NO_INIT):
        raise RecipeError(
            f"--init {sources.init} names one initial adapter for several adapters; convert that one with "
            "to-lora first, or give --init none"
        )
    group_weights(options, len(adapters))
    return plan_group_merge(open_group_on_base(adapters, sources, options.alpha), options)


def plan_group_merge(group: AdapterGroup, options: MergeOptions) -> GroupPlan:
    """Plan from headers.

    Raises ArtifactError if an adapter does not fit the base, RecipeError for options that need one adapter.
    """
    weights = group_weights(options, len(group.deltas))
    base = group.base
    assert base is not None
    name, layout = base.layout(group.deltas[0].layout_name)
    source = layout.divided(base.source)
    infos = source.infos
    modules: dict[str, list[tuple[int, Change]]] = {}
    for index, delta in enumerate(group.deltas):
        for module, shares in _shares(delta, base).items():
            refuse_shape(delta, module, shares, infos)
            for share in shares:
                modules.setdefault(share.tensor, []).append((index, Change(module, share)))
    refuse_codes(base.path, base.config, infos, modules)
    extras = _extras(group, TensorNames(layout, infos))
    codes = {
        tensor: infos[tensor].dtype if options.dtype == "auto" else dtype_code(getattr(torch, options.dtype))
        for tensor in [*modules, *extras]
    }
    refuse_idle_merge_options(options, {codes[tensor] for tensor in modules})
    outputs = [replace(info, dtype=codes.get(tensor, info.dtype)) for tensor, info in infos.items()]
    shards = plan_files(outputs, base.source.infos, "base", layout, options)
    return GroupPlan(
        group=group,
        source=source,
        options=options,
        weights=weights,
        layout=name,
        modules=modules,
        extras=extras,
        shards=tuple(shards),
        dtypes=codes,
    )


def _shares(delta: AdapterDelta, base: OpenModel) -> Shares:
    """The tensors that each module changes. Raises ArtifactError for a head that the base does not store."""
    shares = adapted_tensors(delta, base)
    if absent := [module for module in delta.modules if module not in shares]:
        raise ArtifactError(
            f"{delta.directory} adapts {absent[0]}, which the base ties to its embeddings; merge this "
            "adapter on its own"
        )
    return shares


def group_weights(options: MergeOptions, count: int) -> tuple[float, ...]:
    """One weight for each adapter. Raises RecipeError for another number of them."""
    weights = options.weights or (1.0,) * count
    if len(weights) != count:
        raise RecipeError(
            f"--weights has {len(weights)} numbers for {count} adapters; give one for each, in their order"
        )
    return weights


def _extras(group: AdapterGroup, names: TensorNames) -> dict[str, str]:
    """Tensor -> parameter trained in full. Raises ArtifactError if the base has no such tensor."""
    found: dict[str, str] = {}
    for parameter, each in group.parameters.items():
        tensor = names.tensor(parameter)
        if tensor is None:
            owner = group.deltas[next(iter(each))].directory
            raise ArtifactError(
                f"{owner} trained {parameter} in full, which the base does not store; merge this adapter on "
                "its own"
            )
        found[tensor] = parameter
    return found


@dataclass(frozen=True)
class GroupMergeJob:
    """The merge of several adapters."""

    plan: GroupPlan
    command: str = "merge"

    @property
    def options(self) -> MergeOptions:
        """The options as the user gave them."""
        return self.plan.options

    @property
    def base(self) -> OpenModel:
        """The model that the adapters are merged into."""
        assert self.plan.group.base is not None
        return self.plan.group.base

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """The shards of the merged model."""
        return self.plan.shards

    @property
    def inputs(self) -> list[Path]:
        """The base, and every directory that the adapters were read from."""
        group = self.plan.group
        return [self.base.path, *(path for delta in group.deltas for path in delta.input_paths())]

    def identity(self) -> dict[str, Any]:
        """The base and the adapters in their order."""
        group = self.plan.group
        adapters = {f"adapter {n}": delta.identity() for n, delta in enumerate(group.deltas, 1)}
        return {"weights": self.base.identity(), **adapters}

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Merge or copy every tensor."""
        device = pick_device(run.device, run.ranks.local)
        stream(group_work(self.plan, device), self.plan.source, staged, run)

    def write_sidecars(self, directory: Path) -> None:
        """The base's sidecars, and the tokenizer of the first adapter that brings one."""
        base = self.base
        complete_checkpoint(base.sidecars, directory, self.plan.shards, was_decoded=base.is_decoded)
        copy_one_tokenizer(self.plan.group.directories, directory)

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the merged checkpoint."""
        known = self.plan.group.deltas[0].manifest
        return Manifest(
            kind="merged",
            layout=self.plan.layout,
            method=known.method if known else "lora",
            base=self.base.origin(source_checksums(staged)),
            options=asdict(self.options),
            result=MergeResult(side="base", update=measured_update(notes(staged, self.plan.modules))),
            files=file_checksums(staged),
            roles=roles_of(self.files),
            threads=threads,
        )

    def remarks(self, manifest: Manifest) -> Iterator[str]:
        """Warnings if nothing changed or too much was lost, and which of several tokenizers was taken."""
        if not self.plan.extras:
            yield from remark_on_nothing(manifest, "the weighted changes cancel, or there were none")
        if self.options.rounding == "nearest":
            yield from remark_on_rounding(
                manifest, "--dtype float32 keeps it, --rounding stochastic does on average"
            )
        yield from other_tokenizers(self.plan.group.directories)


def group_work(plan: GroupPlan, device: torch.device) -> TensorJob:
    """How each tensor of the base is merged or copied."""
    assert plan.group.base is not None
    copies = {info.name: file.path for file in plan.shards for info in file.units}
    return TensorJob(
        order=list(copies),
        matrices=plan.dtypes,
        compute=lambda name, stored: _merge_tensor(plan, name, copies[name], stored),
        copies=copies,
        device=device,
        parallelism=parallel_matrices(device),
        origin=str(plan.group.base.path),
    )


def _merge_tensor(plan: GroupPlan, name: str, file: str, stored: Tensor) -> TensorResult:
    dtype = torch_dtype(plan.dtypes[name])
    if name in plan.extras:
        return TensorResult({(file, name): cast_finite(name, _changed(plan, name, stored), dtype)})
    changes = plan.modules[name]
    rows = stored.shape[1] if changes[0][1].share.transposed else stored.shape[0]
    products = []
    for index, change in changes:
        left, right = exact_factors(plan.group.deltas[index], change.module)
        products.append(((left * plan.weights[index], right), change.share))
    left, right = (side.to(stored.device) for side in joined_product(products, rows))
    stochastic = plan.options.rounding == "stochastic" and dtype != torch.float32
    generator = Solver(name, seed=plan.options.seed).generator(stored.device) if stochastic else None
    merged, realised = merged_(stored, (left, right), dtype, None, generator)
    if (realised is None or not isfinite(realised.cosine)) and not merged.isfinite().all():
        raise TargetError(
            f"merging {name} gives values that are NaN or Inf; check the base and the weights, or choose "
            "another --dtype"
        )
    return TensorResult({(file, name): merged}, asdict(realised) if realised else {})


def _changed(plan: GroupPlan, name: str, stored: Tensor) -> Tensor:
    """A parameter trained in full: the base's value plus the weighted changes, in float32."""
    base = stored.float()
    total = base.clone()
    for index, tensor in plan.group.trained_parameter(plan.extras[name]).items():
        if tensor.shape != base.shape:
            raise ArtifactError(
                f"{plan.group.deltas[index].directory} trained {name} with the shape {tuple(tensor.shape)}, "
                f"and the base has it with {tuple(base.shape)}; give the base that it was made for"
            )
        total.add_(tensor.to(base.device) - base, alpha=plan.weights[index])
    return total
