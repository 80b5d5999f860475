"""merge: what will be written, planned from headers alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from svdconvert.checkpoint.rename_rules import sort_by_rules
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, dtype_code
from svdconvert.config.options import MergeOptions
from svdconvert.config.sizes import parse_size
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapted_tensors import TensorNames, adapted_tensors, is_head
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.merge_weights import MergeWeights
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.storage_format import refuse_codes
from svdconvert.layouts.base import Layout
from svdconvert.manifest.fingerprint import tensor_checksum
from svdconvert.manifest.results import Side
from svdconvert.output.plan import PlannedFile, plan_model
from svdconvert.pipeline.effects import refuse_idle_merge_options, refuse_idle_shard_size


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
    if delta.adapter.config.dora and (delta.initial_adapter is not None or delta.recovered is not None):
        raise ArtifactError(
            f"{delta.directory} is a DoRA adapter that started from a part of its base; merge it with PEFT"
        )
    source = weights.model.source
    name, layout = weights.model.layout(delta.layout_name)
    modules = {tensor: module for module, tensor in adapted_tensors(delta, weights.model).items()}
    refuse_codes(weights.model.path, weights.model.config, source.infos, modules)
    for tensor, module in modules.items():
        _refuse_shape(delta, module, source.infos[tensor])
    added = _added(delta, source, layout)
    extras = _replaced(delta, weights.model, layout, set(added.values()))
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
    if layout.family.file is not None:
        refuse_idle_shard_size(options.max_shard_size, f"{layout.family.file} is never split")
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
    delta: AdapterDelta, model: OpenModel, layout: Layout, added: Collection[str]
) -> dict[str, str]:
    """Tensor -> parameter, for tensors of the model that the adapter trained in full."""
    infos = model.source.infos
    names = TensorNames(layout, infos)
    replaced: dict[str, str] = {}
    for parameter, key in delta.adapter.extras.items():
        if parameter in added:
            continue
        tensor = names.tensor(parameter)
        if tensor is None and _is_copy_for_tied_head(delta, parameter):
            continue
        if tensor is None:
            raise _absent(delta, parameter)
        shape = delta.adapter.source.infos[key].shape
        if shape != (known := infos[tensor].shape):
            _refuse_other_vocabulary(delta, parameter.removesuffix(".weight"), shape, known)
            raise ArtifactError(
                f"{delta.directory} trained {parameter} with the shape {shape}, and the model has it with "
                f"{known}; give the model that it was made for"
            )
        tied = delta.adapter.config.ties_saved_modules
        if parameter.endswith("embed_tokens.weight") and not (tied or any("head" in name for name in infos)):
            raise ArtifactError(
                f"{delta.directory} trained {parameter} in full, which the model ties to its head: merging "
                "would change the head too; untie them first, or train without it"
            )
        replaced[tensor] = parameter
    return replaced


def _is_copy_for_tied_head(delta: AdapterDelta, parameter: str) -> bool:
    """True for a head that is stored in addition to the same embeddings, and tied to them in the model."""
    if not (delta.adapter.config.ties_saved_modules and is_head(parameter.removesuffix(".weight"))):
        return False
    adapter = delta.adapter
    known = tensor_checksum(adapter.source, adapter.extras[parameter])
    others = (name for name in adapter.extras.values() if name.endswith("embed_tokens.weight"))
    return any(tensor_checksum(adapter.source, name) == known for name in others)


def _absent(delta: AdapterDelta, parameter: str) -> ArtifactError:
    """The error for a parameter that was trained in full and that the model does not store."""
    if is_head(parameter.rpartition(".")[0]):
        return ArtifactError(
            f"{delta.directory} trained {parameter} in full, which the model does not store, because its "
            "head is tied to the embeddings; merge it with PEFT into a model whose embeddings are not tied"
        )
    return ArtifactError(
        f"{delta.directory} trained {parameter} in full, which the model does not have: a new part, such as "
        "a head for classification, is merged only if train made it; merge it with PEFT into the class of "
        "transformers that has this part"
    )


def _refuse_other_vocabulary(
    delta: AdapterDelta, module: str, adapted: tuple[int, ...], stored: tuple[int, ...]
) -> None:
    """Raise ArtifactError if embeddings or a head differ in their rows only."""
    is_vocabulary = is_head(module) or module.rpartition(".")[2] == "embed_tokens"
    if is_vocabulary and adapted[1:] == stored[1:]:
        raise ArtifactError(
            f"{delta.directory} has {module} with {adapted[0]} rows, and the model with {stored[0]}: it was "
            "trained with another vocabulary; resize the model (resize_token_embeddings of transformers), "
            "save it, and give it with --base"
        )


def _refuse_shape(delta: AdapterDelta, module: str, info: TensorInfo) -> None:
    adapted = (delta.adapter.shape(module, "lora_B")[0], delta.adapter.shape(module, "lora_A")[1])
    if adapted != info.shape:
        _refuse_other_vocabulary(delta, module, adapted, info.shape)
        raise ArtifactError(
            f"{delta.directory} adapts {module} as {adapted}, but {info.name} has the shape {info.shape}"
        )


def _merged_code(delta: AdapterDelta, info: TensorInfo, options: MergeOptions) -> str:
    if options.dtype != "auto":
        return dtype_code(getattr(torch, options.dtype))
    known = delta.manifest.matrices.get(info.name) if delta.manifest else None
    return known.dtype if known else info.dtype
