"""merge: what will be written, planned from headers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from svdconvert.checkpoint.rename_rules import sort_by_rules
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, dtype_code
from svdconvert.config.options import MergeOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapted_tensors import adapted_tensors
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.merge_weights import MergeWeights
from svdconvert.inputs.storage_format import refuse_codes
from svdconvert.inputs.tensor_names import Share
from svdconvert.layouts.base import Layout
from svdconvert.manifest.results import Side
from svdconvert.output.plan import PlannedFile, plan_divided, plan_model
from svdconvert.pipeline.effects import refuse_idle_merge_options, refuse_idle_shard_size
from svdconvert.pipeline.merge_extras import Extras, NewTensor, plan_extras, refuse_other_vocabulary


@dataclass(frozen=True, slots=True)
class Change:
    """The change of a tensor by the factors of one module."""

    module: str
    share: Share


@dataclass(frozen=True)
class MergePlan:
    """What will be written, planned from headers alone."""

    source: TensorSource
    """The weights, divided as the layout has it."""
    weights: MergeWeights
    layout: str
    options: MergeOptions
    modules: Mapping[str, Sequence[Change]]
    """Tensor -> what changes it, for the adapted matrices."""
    extras: Mapping[str, str]
    """Tensor -> parameter, for tensors that are replaced by parameters trained in full."""
    added: Mapping[str, NewTensor]
    """Tensor -> how it is made, for the tensors of a trained head that the model does not have."""
    shards: tuple[PlannedFile, ...]
    dtypes: Mapping[str, str]
    """Element type of every tensor that is merged or replaced."""
    resized: Mapping[str, str]
    """Tensor -> parameter of the adapter that is its base, for tensors of another number of rows."""
    head: Mapping[str, Any]
    """Entries of config.json that describe what the adapter adds or resizes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(shard.nbytes for shard in self.shards)


def plan_merge(weights: MergeWeights, options: MergeOptions) -> MergePlan:
    """Plan from headers. Raises ArtifactError if the adapter does not fit the model."""
    delta = weights.delta
    if delta.adapter.config.dora and (delta.initial_adapter is not None or delta.recovered is not None):
        raise ArtifactError(
            f"{delta.directory} is a DoRA adapter that started from a part of its base; merge it with PEFT"
        )
    name, layout = weights.model.layout(delta.layout_name)
    source = layout.divided(weights.model.source)
    shares = adapted_tensors(delta, weights.model)
    extras = plan_extras(delta, weights.model, source.infos, layout)
    modules: dict[str, list[Change]] = {}
    for module, of_module in shares.items():
        if module in extras.heads:
            continue
        if of_module[0].tensor not in extras.rows:
            refuse_shape(delta, module, of_module, source.infos)
        for share in of_module:
            modules.setdefault(share.tensor, []).append(Change(module, share))
    if delta.adapter.config.dora:
        _refuse_divided_dora(delta, modules, extras)
    refuse_codes(weights.model.path, weights.model.config, source.infos, modules)
    replaced = extras.replaced
    dtypes = {tensor: _merged_code(delta, source.infos[tensor], options) for tensor in [*modules, *replaced]}
    outputs = [
        replace(info, dtype=dtypes.get(tensor, info.dtype), shape=extras.shape(info))
        for tensor, info in source.infos.items()
    ]
    for tensor, new in extras.added.items():
        dtypes[tensor] = new.dtype if new.module is None else _merged_code(delta, new.info(tensor), options)
        outputs.append(replace(new.info(tensor), dtype=dtypes[tensor]))
    refuse_idle_merge_options(options, {dtypes[tensor] for tensor in modules})
    shards = tuple(plan_files(outputs, weights.model.source.infos, weights.side, layout, options))
    return MergePlan(
        source=source,
        weights=weights,
        layout=name,
        options=options,
        modules=modules,
        extras=replaced,
        added=extras.added,
        shards=shards,
        dtypes=dtypes,
        resized={tensor: parameter for tensor, parameter in extras.bases.items() if tensor in modules},
        head=extras.config,
    )


def plan_files(
    outputs: list[TensorInfo],
    stored: Mapping[str, TensorInfo],
    side: Side,
    layout: Layout,
    options: MergeOptions,
) -> list[PlannedFile]:
    """The files of the plain checkpoint. `stored` are the tensors of the model, undivided.

    The tensors are in the source's order. If that is a residual, whose order differs, they are in the
    layout's.
    """
    limit = parse_size(options.max_shard_size)
    if layout.family is None:
        return plan_divided(outputs, stored, limit)
    if side == "residual":
        by_name = {info.name: info for info in outputs}
        outputs = [by_name[name] for name in sort_by_rules(by_name, layout.family.rules)]
    if layout.family.file is not None:
        refuse_idle_shard_size(options.max_shard_size, f"{layout.family.file} is never split")
    return plan_model(outputs, limit, layout.family.file)


def _refuse_divided_dora(
    delta: AdapterDelta, modules: Mapping[str, Sequence[Change]], extras: Extras
) -> None:
    """Raise ArtifactError if a DoRA adapts a matrix that is not one whole tensor: it scales whole rows."""
    for tensor, changes in modules.items():
        share = changes[0].share
        if len(changes) > 1 or share.of_module or share.of_tensor or tensor in extras.rows:
            raise ArtifactError(
                f"{delta.directory} is a DoRA adapter of {changes[0].module}, which is not the whole tensor "
                f"{tensor} of the model; merge it with PEFT"
            )
    if extras.heads:
        raise ArtifactError(
            f"{delta.directory} is a DoRA adapter of {extras.heads[0]}, which the model ties to its "
            "embeddings; merge it with PEFT into a model whose embeddings are not tied"
        )


def refuse_shape(
    delta: AdapterDelta, module: str, shares: Sequence[Share], infos: Mapping[str, TensorInfo]
) -> None:
    """Raise ArtifactError if the factors of a module do not fit the tensors that make up its matrix."""
    adapted = (delta.adapter.shape(module, "lora_B")[0], delta.adapter.shape(module, "lora_A")[1])
    rows = 0
    for share in shares:
        info = infos[share.tensor]
        shape = info.shape[::-1] if share.transposed else info.shape
        count = share.of_tensor.size if share.of_tensor else shape[0]
        rows = max(rows, share.of_module.slice.stop if share.of_module else count)
        if len(shape) != 2 or adapted[1] != shape[1] or adapted[0] < rows:  # noqa: PLR2004 (a matrix)
            rows = -1
            break
    if rows != adapted[0]:
        refuse_other_vocabulary(delta, module, adapted, info.shape)
        raise ArtifactError(
            f"{delta.directory} adapts {module} as {adapted}, but {info.name} has the shape {info.shape}"
        )


def _merged_code(delta: AdapterDelta, info: TensorInfo, options: MergeOptions) -> str:
    if options.dtype != "auto":
        return dtype_code(getattr(torch, options.dtype))
    known = delta.manifest.matrices.get(info.name) if delta.manifest else None
    return known.dtype if known else info.dtype
