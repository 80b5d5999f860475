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
from svdconvert.inputs.tensor_names import Share
from svdconvert.layouts.base import Layout
from svdconvert.manifest.results import Side
from svdconvert.output.plan import PlannedFile, plan_divided, plan_model
from svdconvert.pipeline.effects import refuse_idle_merge_options, refuse_idle_shard_size
from svdconvert.pipeline.merge_extras import Extras, NewTensor, plan_extras, refuse_other_vocabulary
from svdconvert.pipeline.merge_kept import keep_format, kept_files, with_same_parts
from svdconvert.quantization.view import DecodedSource, is_decoded


@dataclass(frozen=True, slots=True)
class Change:
    """The change of a tensor by the factors of one module."""

    module: str
    share: Share


@dataclass(frozen=True)
class MergePlan:
    """What will be written, planned from headers alone."""

    source: TensorSource
    """The weights, divided as the layout has it; with `keep_format` only changed ones are decoded."""
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
    kept: DecodedSource | None = None
    """With `keep_format`, the undivided weights, of which those are decoded that are quantised again."""

    def is_kept(self, name: str) -> bool:
        """True for a matrix that is quantised again."""
        return self.kept is not None and name in self.kept.coded

    def places(self) -> dict[str, str]:
        """Tensor of `source` -> file of the output, in the order of the files."""
        coded = self.kept.coded if self.kept else {}
        owner = {stored: name for name, (_, each) in coded.items() for stored in each.stored}
        places: dict[str, str] = {}
        for file in self.shards:
            for info in file.units:
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
    _refuse_dora(delta, options)
    weights.model.refuse_unknown_format()
    name, layout = weights.model.layout(delta.layout_name)
    source = layout.divided(weights.model.source)
    extras = plan_extras(delta, weights.model, source.infos, layout)
    modules = _changes(weights, source, extras)
    weights.model.refuse_codes(source.infos, modules)
    replaced = extras.replaced
    changed = [*modules, *replaced]
    kept = keep_format(weights.model, changed, extras) if options.keep_format else None
    plain = [tensor for tensor in changed if kept is None or tensor not in kept.coded]
    dtypes = {tensor: _merged_code(delta, source.infos[tensor], options) for tensor in plain}
    outputs = [
        replace(info, dtype=dtypes.get(tensor, info.dtype), shape=extras.shape(info))
        for tensor, info in source.infos.items()
    ]
    for tensor, new in extras.added.items():
        dtypes[tensor] = new.dtype if new.module is None else _merged_code(delta, new.info(tensor), options)
        outputs.append(replace(new.info(tensor), dtype=dtypes[tensor]))
    refuse_idle_merge_options(options, {dtypes[tensor] for tensor in modules if tensor in dtypes})
    if kept is None:
        shards = plan_files(outputs, weights.model.source.infos, weights.side, layout, options)
    else:
        source = with_same_parts(kept, source)
        plain_outputs = {
            info.name: info for info in outputs if not is_decoded(weights.model.source, info.name)
        }
        limit = parse_size(options.max_shard_size)
        shards = kept_files(kept, source.infos.values(), plain_outputs, limit)
    return MergePlan(
        source=source,
        weights=weights,
        layout=name,
        options=options,
        modules=modules,
        extras=replaced,
        added=extras.added,
        shards=tuple(shards),
        dtypes=dtypes,
        kept=kept,
        resized={tensor: parameter for tensor, parameter in extras.bases.items() if tensor in modules},
        head=extras.config,
    )


def _refuse_dora(delta: AdapterDelta, options: MergeOptions) -> None:
    """Raise ArtifactError for a DoRA adapter that cannot be merged with these options."""
    if not delta.adapter.config.dora:
        return
    if delta.initial_adapter is not None or delta.recovered is not None:
        raise ArtifactError(
            f"{delta.directory} is a DoRA adapter that started from a part of its base; merge it with PEFT"
        )
    if options.keep_format:
        raise ArtifactError(f"--keep-format cannot merge the DoRA adapter {delta.directory}; leave it out")


def _changes(weights: MergeWeights, source: TensorSource, extras: Extras) -> dict[str, list[Change]]:
    """Tensor -> what changes it. Raises ArtifactError if the adapter does not fit the model."""
    delta = weights.delta
    modules: dict[str, list[Change]] = {}
    for module, of_module in adapted_tensors(delta, weights.model).items():
        if module in extras.heads:
            continue
        if of_module[0].tensor not in extras.rows:
            refuse_shape(delta, module, of_module, source.infos)
        for share in of_module:
            modules.setdefault(share.tensor, []).append(Change(module, share))
    if delta.adapter.config.dora:
        _refuse_divided_dora(delta, modules, extras)
    return modules


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
