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
from svdconvert.layouts.base import Layout
from svdconvert.manifest.results import Side
from svdconvert.output.plan import PlannedFile, plan_groups, plan_model
from svdconvert.pipeline.effects import refuse_idle_merge_options, refuse_idle_shard_size
from svdconvert.pipeline.merge_kept import keep_format, stored_groups
from svdconvert.quantization.view import DecodedSource


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
    """Element type of every tensor that is merged or replaced and not quantised again."""
    kept: DecodedSource | None = None
    """With `keep_format`, the weights with only those matrices decoded that are quantised again."""

    @property
    def source(self) -> TensorSource:
        """The tensors that are read."""
        return self.kept or self.weights.model.source

    def is_kept(self, name: str) -> bool:
        """True for a matrix that is quantised again."""
        return self.kept is not None and name in self.kept.coded

    def places(self) -> dict[str, str]:
        """Tensor of `source` -> file of the output, in the order of the files."""
        coded = self.kept.coded if self.kept else {}
        owner = {stored: name for name, (_, each) in coded.items() for stored in each.stored}
        places: dict[str, str] = {}
        for file in self.shards:
            for info in file.infos:
                if info.name not in self.added:
                    places.setdefault(owner.get(info.name, info.name), file.path)
        return places

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(shard.nbytes for shard in self.shards)


def plan_merge(weights: MergeWeights, options: MergeOptions) -> MergePlan:
    """Plan from headers. Raises ArtifactError if the adapter does not fit the model."""
    delta = weights.delta
    source = weights.model.source
    layout_name, layout = weights.model.layout(delta.layout_name)
    modules = {tensor: module for module, tensor in adapted_tensors(delta, weights.model).items()}
    weights.model.refuse_unknown_format()
    weights.model.refuse_codes(modules)
    for tensor, module in modules.items():
        _refuse_shape(delta, module, source.infos[tensor])
    added = _added(delta, source, layout)
    extras = _replaced(delta, weights.model, layout, set(added.values()))
    new = [_new(delta, tensor, parameter) for tensor, parameter in added.items()]
    changed = [*modules, *extras]
    kept = keep_format(weights.model, changed) if options.keep_format else None
    plain = [tensor for tensor in changed if kept is None or tensor not in kept.coded]
    dtypes = {tensor: _merged_code(delta, source.infos[tensor], options) for tensor in plain}
    refuse_idle_merge_options(options, {dtypes[tensor] for tensor in modules if tensor in dtypes})
    if kept is None:
        outputs = [replace(info, dtype=dtypes.get(name, info.dtype)) for name, info in source.infos.items()]
        shards = _files([*outputs, *new], weights.side, layout, options)
    else:
        shards = plan_groups(stored_groups(kept, dtypes, new), parse_size(options.max_shard_size))
    return MergePlan(weights, layout_name, options, modules, extras, added, tuple(shards), dtypes, kept)


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
        if tensor is None:
            raise _absent(delta, parameter)
        shape = delta.adapter.source.infos[key].shape
        if shape != (known := infos[tensor].shape):
            _refuse_other_vocabulary(delta, parameter.removesuffix(".weight"), shape, known)
            raise ArtifactError(
                f"{delta.directory} trained {parameter} with the shape {shape}, and the model has it with "
                f"{known}; give the model that it was made for"
            )
        if parameter.endswith("embed_tokens.weight") and not any("head" in name for name in infos):
            raise ArtifactError(
                f"{delta.directory} trained {parameter} in full, which the model ties to its head: merging "
                "would change the head too; untie them first, or train without it"
            )
        replaced[tensor] = parameter
    return replaced


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
