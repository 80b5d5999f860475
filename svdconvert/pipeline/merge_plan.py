"""merge: what will be written, planned from headers alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from svdconvert.checkpoint.rename_rules import sort_by_rules
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, dtype_code
from svdconvert.config.options import MergeOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.merge_weights import MergeWeights
from svdconvert.inputs.storage_format import refuse_codes
from svdconvert.layouts.base import Layout
from svdconvert.manifest.results import Side
from svdconvert.output.plan import PlannedFile, plan_model
from svdconvert.pipeline.effects import refuse_idle_merge_options


@dataclass(frozen=True)
class MergePlan:
    """What will be written, planned from headers alone."""

    weights: MergeWeights
    layout: str
    options: MergeOptions
    modules: Mapping[str, str]
    """Tensor -> module, for the adapted matrices."""
    extras: Mapping[str, str]
    """Tensor -> parameter, for tensors that are replaced by parameters trained in full."""
    added: Mapping[str, str]
    """Tensor -> parameter, for the tensors of a trained head that the model does not have."""
    shards: tuple[PlannedFile, ...]
    dtypes: Mapping[str, str]
    """Element type of every tensor that is merged or replaced."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(shard.nbytes for shard in self.shards)


def plan_merge(weights: MergeWeights, options: MergeOptions) -> MergePlan:
    """Plan from headers. Raises ArtifactError if the adapter does not fit the model."""
    delta = weights.delta
    source = weights.model.source
    name, layout = weights.model.layout(delta.layout_name)
    slots = layout.slots(source.infos)
    # An adapter made for another layout of the family has the module names of the family's network.
    by_module = {layout.network_path(tensor): tensor for tensor in slots} if layout.family else {}
    by_module |= {slot.module: tensor for tensor, slot in slots.items()}
    if unknown := [module for module in delta.modules if module not in by_module]:
        raise ArtifactError(
            f"{delta.directory} adapts {unknown[0]}, which the model does not have as a matrix of its layers "
            f"({len(unknown)} such modules); give the model that it was made for"
        )
    modules = {by_module[module]: module for module in delta.modules}
    refuse_codes(weights.model.path, weights.model.config, source.infos, modules)
    for tensor, module in modules.items():
        _refuse_shape(delta, module, source.infos[tensor])
    added = _added(delta, source, layout)
    extras = _replaced(delta, source, layout, set(added.values()))
    dtypes = {tensor: _merged_code(delta, source.infos[tensor], options) for tensor in [*modules, *extras]}
    outputs = [replace(info, dtype=dtypes.get(tensor, info.dtype)) for tensor, info in source.infos.items()]
    outputs += [_new(delta, tensor, parameter) for tensor, parameter in added.items()]
    refuse_idle_merge_options(options, {dtypes[tensor] for tensor in modules})
    shards = tuple(_files(outputs, weights.side, layout, options))
    return MergePlan(weights, name, options, modules, extras, added, shards, dtypes)


def _files(outputs: list[TensorInfo], side: Side, layout: Layout, options: MergeOptions) -> list[PlannedFile]:
    """The files of the plain checkpoint.

    The tensors are in the source's order. If that is a residual, whose order differs, they are in the
    layout's.
    """
    limit = parse_size(options.max_shard_size)
    if layout.family is None:
        return plan_model(outputs, limit)
    if side == "residual":
        by_name = {info.name: info for info in outputs}
        outputs = [by_name[name] for name in sort_by_rules(by_name, layout.family.rules)]
    return plan_model(outputs, limit, layout.family.file)


def _added(delta: AdapterDelta, source: TensorSource, layout: Layout) -> dict[str, str]:
    """Tensor -> parameter, for the parameters of a trained head that the model does not have."""
    if not (delta.manifest and delta.manifest.head):
        return {}
    stored = {layout.runtime_name(name) for name in source.infos}
    prefixed = any(name.startswith(layout.prefix) for name in source.infos)
    return {
        parameter if prefixed else parameter.removeprefix(layout.prefix): parameter
        for parameter in delta.adapter.extras
        if parameter not in stored
    }


def _new(delta: AdapterDelta, name: str, parameter: str) -> TensorInfo:
    return replace(delta.adapter.source.infos[delta.adapter.extras[parameter]], name=name)


def _replaced(
    delta: AdapterDelta, source: TensorSource, layout: Layout, added: Collection[str]
) -> dict[str, str]:
    """Tensor -> parameter, for tensors of the model that the adapter trained in full."""
    by_parameter = {layout.runtime_name(name): name for name in source.infos}
    replaced = {parameter: key for parameter, key in delta.adapter.extras.items() if parameter not in added}
    for parameter, key in replaced.items():
        shape = delta.adapter.source.infos[key].shape
        if parameter not in by_parameter:
            raise ArtifactError(
                f"{delta.directory} trained {parameter} in full, which the model does not store (its head "
                "may be tied to the embeddings); merge it with PEFT into a model that has it"
            )
        if shape != (known := source.infos[by_parameter[parameter]].shape):
            raise ArtifactError(
                f"{delta.directory} trained {parameter} with the shape {shape}, and the model has it with "
                f"{known}; give the model that it was made for"
            )
        if parameter.endswith("embed_tokens.weight") and not any("head" in name for name in source.infos):
            raise ArtifactError(
                f"{delta.directory} trained {parameter} in full, which the model ties to its head: merging "
                "would change the head too; untie them first, or train without it"
            )
    return {by_parameter[parameter]: parameter for parameter in replaced}


def _refuse_shape(delta: AdapterDelta, module: str, info: TensorInfo) -> None:
    adapted = (delta.adapter.shape(module, "lora_B")[0], delta.adapter.shape(module, "lora_A")[1])
    if adapted != info.shape:
        raise ArtifactError(
            f"{delta.directory} adapts {module} as {adapted}, but {info.name} has the shape {info.shape}"
        )


def _merged_code(delta: AdapterDelta, info: TensorInfo, options: MergeOptions) -> str:
    if options.dtype != "auto":
        return dtype_code(getattr(torch, options.dtype))
    known = delta.manifest.matrices.get(info.name) if delta.manifest else None
    return known.dtype if known else info.dtype
