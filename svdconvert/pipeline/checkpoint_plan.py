"""combine: which tensors of which checkpoints make each tensor of the new one, planned from headers alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from svdconvert.checkpoint.picked import PickedSource
from svdconvert.checkpoint.tensors import REAL, dtype_code
from svdconvert.config.combine import CombineOptions
from svdconvert.config.mergekit_file import MergeFile, Slice, SliceSource
from svdconvert.config.mergekit_file import Settings as FileSettings
from svdconvert.config.sizes import parse_size
from svdconvert.errors import ArtifactError, RecipeError, SvdConvertError
from svdconvert.inputs.checkpoint_group import (
    Place,
    layer_counts,
    place_of,
    refuse_left_out,
    refuse_misfit,
    tensor_in,
)
from svdconvert.inputs.model import OpenModel
from svdconvert.merging.base import MergeMethod, Settings
from svdconvert.output.plan import PlannedFile, plan_model
from svdconvert.pipeline.combine_settings import check_count, find_method
from svdconvert.pipeline.merge_parameters import refuse_unknown, resolve

_MATRIX = 2


@dataclass(frozen=True)
class Merged:
    """How one tensor is made."""

    parts: tuple[tuple[int, str], ...]
    """(position of a model, name of the tensor in it), the base among them."""
    settings: Settings
    """`base` is the base's position among the parts; None without one."""


@dataclass(frozen=True)
class CheckpointPlan:
    """What will be written."""

    models: tuple[OpenModel, ...]
    first: int
    """The position of the model whose sidecars are kept: the base, else the first."""
    method_name: str
    method: MergeMethod
    options: CombineOptions
    file: MergeFile
    tensors: Mapping[str, Merged]
    source: PickedSource
    """Every tensor of the new checkpoint as the base, or the first model of its slice, has it."""
    dtypes: Mapping[str, str]
    """Element type of every tensor that is merged; others are copied."""
    shards: tuple[PlannedFile, ...]
    layout: str
    layers: tuple[int, ...] | None
    """Which layer of the kept configuration each layer is like; None if all are as they were."""


@dataclass(frozen=True)
class _Opened:
    """The models of a file, and its settings with their place for messages."""

    file: MergeFile
    models: Mapping[str, OpenModel]
    method: MergeMethod
    seed: int
    place: str

    def base_of(self, part: Slice) -> str | None:
        """The base of a slice."""
        return part.base or self.file.base

    def sources(self, part: Slice) -> list[SliceSource]:
        """The sources of a slice, and the base if it is not one of them."""
        base = self.base_of(part)
        known = list(part.sources)
        if base is not None and base not in [source.model for source in known]:
            if known[0].layers is not None:
                if self.method.base != "needed":
                    return known
                raise RecipeError(
                    f"{self.place}: a slice does not say which layers of the base {base} it is merged with; "
                    "add the base to its sources"
                )
            known.append(SliceSource(base))
        return known


def plan_checkpoint(
    models: Mapping[str, OpenModel], file: MergeFile, options: CombineOptions, place: str
) -> CheckpointPlan:
    """Plan from headers; `models` are the open models by the names that `file` has for them.

    Raises ArtifactError if the models do not fit together, RecipeError for parameters that the method does
    not take.
    """
    method = find_method(file.method, "checkpoints")
    opened = _Opened(file, models, method, options.seed, place)
    for part in file.slices:
        _check_slice(opened, part)
    names = list(models)
    first = names.index(file.base) if file.base is not None else names.index(file.slices[0].sources[0].model)
    kept = models[names[first]]
    for model in models.values():
        refuse_misfit(kept, model)
        model.refuse_unknown_format()
    tensors: dict[str, Merged] = {}
    picked: dict[str, tuple[Any, str]] = {}
    for name, merged in _tensors(opened):
        tensors[name] = merged
        index, own = merged.parts[merged.settings.base or 0]
        picked[name] = (models[names[index]].source, own)
    if _layers(opened, names[first]) is None:
        refuse_left_out(list(models.values()), first, [merged.parts for merged in tensors.values()])
    source = PickedSource(picked)
    chosen = file.dtype if options.dtype == "auto" else options.dtype
    code = None if chosen is None else dtype_code(getattr(torch, chosen))
    dtypes = {name: code or info.dtype for name, info in source.infos.items() if info.dtype in REAL}
    outputs = [replace(info, dtype=dtypes.get(name, info.dtype)) for name, info in source.infos.items()]
    layout, single = _layout(kept)
    return CheckpointPlan(
        models=tuple(models.values()),
        first=first,
        method_name=file.method,
        method=method,
        options=options,
        file=file,
        tensors=tensors,
        source=source,
        dtypes=dtypes,
        shards=tuple(plan_model(outputs, parse_size(options.max_shard_size), single)),
        layout=layout,
        layers=_layers(opened, names[first]),
    )


def _check_slice(opened: _Opened, part: Slice) -> None:
    base = opened.base_of(part)
    if opened.method.base == "needed" and base is None:
        raise RecipeError(f"{opened.file.method} merges changes of a base: give it with --base or base_model")
    sources = opened.sources(part)
    if part.sources[0].layers and len({source.model for source in sources}) < len(sources):
        raise RecipeError(f"{opened.place}: a slice has one model twice; give each range a slice of its own")
    others = [source for source in sources if source.model != base or opened.method.base != "needed"]
    check_count(opened.file.method, opened.method, len(others))
    scopes = [*(source.parameters for source in part.sources), part.parameters, opened.file.parameters]
    refuse_unknown(opened.method, scopes, opened.place)


def _tensors(opened: _Opened) -> Iterator[tuple[str, Merged]]:
    """(name, how it is made) of every tensor: embeddings, layers in their order, and the rest."""
    first = opened.file.slices[0]
    last = opened.file.slices[-1]
    rest = []
    for name, place in _outside(opened, first):
        if place.is_first:
            own = {source.model: name for source in opened.sources(first)}
            yield name, _merged(opened, first, own, _Output(name, 0.0))
        else:
            rest.append(name)
    offsets: dict[str, int] = {}
    for part in opened.file.slices:
        yield from _layer_tensors(opened, part, offsets)
    for name in rest:
        own = {source.model: name for source in opened.sources(last)}
        yield name, _merged(opened, last, own, _Output(name, 0.0))


def _outside(opened: _Opened, part: Slice) -> list[tuple[str, Place]]:
    """The tensors outside of the layers, of the model that the slice's tensors are like."""
    source = _like(opened, part)
    places = {name: place_of(name) for name in opened.models[source.model].source.infos}
    return [(name, place) for name, place in places.items() if place.layer is None]


def _like(opened: _Opened, part: Slice) -> SliceSource:
    """The base of a slice, else its first source."""
    base = opened.base_of(part)
    sources = opened.sources(part)
    return next((source for source in sources if source.model == base), sources[0])


def _layer_tensors(opened: _Opened, part: Slice, offsets: dict[str, int]) -> Iterator[tuple[str, Merged]]:
    """The tensors of a slice's layers; `offsets` counts the layers of each stack that are there already."""
    sources = opened.sources(part)
    like = _like(opened, part)
    found = [place_of(name) for name in opened.models[like.model].source.infos]
    counts = layer_counts(opened.models[like.model].source)
    if like.layers is not None and len(counts) > 1:
        raise ArtifactError(
            f"{opened.models[like.model].path} has several stacks of layers ({', '.join(counts)}), of which "
            "no slices can be taken; merge it as a whole"
        )
    for stack, count in counts.items():
        begin, end = like.layers or (0, count)
        length = end - begin
        for step in range(length):
            position = step / (length - 1) if length > 1 else 1.0
            layer = offsets.get(stack, 0) + step
            for place in found:
                if place.stack == stack and place.layer == begin + step:
                    own = {source.model: place.name(_first(source) + step) for source in sources}
                    output = _Output(place.name(layer), position)
                    yield output.name, _merged(opened, part, own, output)
        offsets[stack] = offsets.get(stack, 0) + length


def _first(source: SliceSource) -> int:
    return source.layers[0] if source.layers else 0


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of the new checkpoint."""

    name: str
    position: float
    """That of its layer in the slice, from 0 to 1; 0 outside of the layers."""


def _merged(opened: _Opened, part: Slice, own: Mapping[str, str], output: _Output) -> Merged:
    """How a tensor is made of those called `own` in each model."""
    base = opened.base_of(part)
    sources = opened.sources(part)
    names = list(opened.models)
    parts = []
    shapes: dict[tuple[int, ...], str] = {}
    kinds: dict[bool, str] = {}
    for source in sources:
        model = opened.models[source.model]
        tensor = tensor_in(model, own[source.model])
        parts.append((names.index(source.model), tensor))
        shapes.setdefault(model.source.infos[tensor].shape, source.model)
        kinds.setdefault(model.source.infos[tensor].dtype in REAL, source.model)
    if len(shapes) > 1:
        (one, first), (other, second), *_ = shapes.items()
        raise ArtifactError(
            f"{output.name} has the shape {one} in {opened.models[first].path} and {other} in "
            f"{opened.models[second].path}; merge models of one shape and one vocabulary"
        )
    if False in kinds and (len(kinds) > 1 or len(next(iter(shapes))) == _MATRIX):
        model = opened.models[kinds[False]]
        model.refuse_codes(model.source.infos, [own[kinds[False]]])
    is_needed = opened.method.base == "needed"
    inputs = [source for source in sources if source.model != base or not is_needed]
    each = {
        one.name: [
            resolve(one, _scopes(opened, part, source), own[source.model], output.position, opened.place)
            for source in inputs
        ]
        for one in opened.method.parameters
        if one.per_model
    }
    outer = (part.parameters, opened.file.parameters)
    shared = {
        one.name: resolve(one, outer, output.name, output.position, opened.place)
        for one in opened.method.parameters
        if not one.per_model
    }
    where = [source.model for source in sources].index(base) if base is not None and is_needed else None
    settings = Settings(
        shape=next(iter(shapes)), each=each, shared=shared, base=where, name=output.name, seed=opened.seed
    )
    return Merged(tuple(parts), settings)


def _scopes(opened: _Opened, part: Slice, source: SliceSource) -> tuple[FileSettings | None, ...]:
    """The parameters that apply to a source, from the innermost."""
    return source.parameters, part.parameters, opened.file.parameters


def _layers(opened: _Opened, kept: str) -> tuple[int, ...] | None:
    """The layers of slices, each by its number in the first source; None for whole models."""
    if all(source.layers is None for part in opened.file.slices for source in part.sources):
        return None
    ranges = [_like(opened, part).layers or (0, 0) for part in opened.file.slices]
    return tuple(layer for begin, end in ranges for layer in range(begin, end))


def _layout(model: OpenModel) -> tuple[str, str | None]:
    """(name of the layout, name of its only file); empty for a family that svdconvert does not decompose."""
    try:
        name, layout = model.layout()
    except SvdConvertError:
        return "", None
    return name, layout.family.file if layout.family else None
