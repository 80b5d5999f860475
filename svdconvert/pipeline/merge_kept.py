"""merge --keep-format: an adapted matrix of a quantised base is quantised again by the format's own rule."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from svdconvert.checkpoint.parts import undivided, whole_name, with_parts
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.errors import RecipeError, TargetError
from svdconvert.inputs.model import OpenModel
from svdconvert.linalg.delta import Product, measured, merged_
from svdconvert.output.plan import PlannedFile, plan_divided
from svdconvert.pipeline.merge_extras import Extras
from svdconvert.pipeline.runner import TensorResult
from svdconvert.quantization.base import Parts
from svdconvert.quantization.stacks import one_of_stack
from svdconvert.quantization.view import DecodedSource


def keep_format(model: OpenModel, changed: Collection[str], extras: Extras) -> DecodedSource:
    """The model with only the `changed` quantised weights decoded: all others stay as they are stored.

    Raises RecipeError if no weight of the model is quantised, TargetError if a changed one is in a format
    that cannot be written, is a part of one, or changes its shape.
    """
    source = model.source
    if not isinstance(source, DecodedSource):
        raise RecipeError(
            f"--keep-format changes nothing here: no weight of {model.path} is quantised; leave it out"
        )
    for name in changed:
        plugin, coded = source.coded.get(name) or one_of_stack(source.coded, name) or (None, None)
        if plugin is None and whole_name(name) in source.coded:
            raise TargetError(
                f"{name} is a part of a quantised tensor of {model.path}, which is only written as a whole; "
                "leave out --keep-format"
            )
        if plugin is not None and coded is not None and not plugin.encodes:
            raise TargetError(
                f"{name} of {model.path} is stored as {plugin.title(coded)}, which needs more than the "
                "weights to be written; leave out --keep-format, or convert the adapter with to-lora"
            )
    resized = [name for name in source.coded if extras.shape(source.infos[name]) != source.infos[name].shape]
    copied = [new.copied for new in extras.added.values() if new.parameter is None]
    if found := [*resized, *(name for name in copied if name in source.coded)]:
        raise TargetError(
            f"the adapter adds rows to {found[0]}, or a head made of it, which is quantised; leave out "
            "--keep-format"
        )
    return source.only(changed)


def with_same_parts(kept: DecodedSource, divided: TensorSource) -> TensorSource:
    """`kept` with the parts that `divided` shows of tensors that are not quantised."""
    coded = undivided(divided)
    assert isinstance(coded, DecodedSource)
    names = [name for name in divided.infos if name not in coded.infos]
    return with_parts(kept, [name for name in names if whole_name(name) not in coded.coded])


def kept_files(
    kept: DecodedSource, infos: Iterable[TensorInfo], planned: Mapping[str, TensorInfo], limit: int
) -> list[PlannedFile]:
    """The files of the merged model, with all tensors of one quantised weight in one shard.

    infos: the tensors and parts that are read. planned: how tensors that are not quantised are written; those
    that are not read are added.
    """
    wholes = undivided(kept.stored).infos
    coded = [each for _, each in kept.coded.values()]
    stored_as = {each.name: [kept.stored.infos[name] for name in each.stored] for each in coded}
    read = {info.name: planned.get(info.name, info) for info in infos}
    units = [tensor for info in {**read, **planned}.values() for tensor in stored_as.get(info.name, [info])]
    together = {each.stored[0]: each.stored for each in coded if each.stored[0] in wholes}
    later = {name for names in together.values() for name in names[1:]}

    def of_one_weight(info: TensorInfo) -> Sequence[TensorInfo]:
        names = () if info.name in later else together.get(info.name)
        return (info,) if names is None else [wholes[name] for name in names]

    return plan_divided(units, {**kept.infos, **wholes}, limit, of_one_weight)


def merge_kept(
    source: DecodedSource, name: str, file: str, stored: Tensor, products: tuple[Product, Product | None]
) -> TensorResult:
    """The stored tensors of the quantised weight `name` with an adapter merged into it.

    stored: the decoded weight in float32, which is overwritten. products: what is added to it, and the part
    of that which is meant to change the model, None if it is not known. If nothing is added, all stored
    bytes stay.
    """
    product, update = products
    parts = source.parts(name)
    if not product[0].any():
        return _result(source, name, file, parts, None)
    merged, _ = merged_(stored, product, torch.float32)
    _refuse_overflow(name, merged)
    made = encoded(source, name, merged, parts)
    plugin, coded = source.coded[name]
    if update is None:
        return _result(source, name, file, made, None)

    def rounded_off() -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for block in source.float32_blocks(name, parts=made):
            rows = slice(start, start := start + len(block))
            yield rows, merged[rows].sub_(block.to(merged.device))

    realised = measured(update, rounded_off())
    return _result(source, name, file, made, asdict(realised) if realised else None)


def replace_kept(source: DecodedSource, name: str, file: str, tensor: Tensor) -> TensorResult:
    """The stored tensors of the quantised weight `name` with the values of `tensor`."""
    made = encoded(source, name, tensor.float(), source.parts(name))
    return _result(source, name, file, made, None)


def encoded(source: DecodedSource, name: str, weight: Tensor, parts: Parts) -> Parts:
    """The parts of a weight in its own format."""
    plugin, coded = source.coded[name]
    return plugin.encode(coded, weight.cpu(), parts)


def _result(
    source: DecodedSource, name: str, file: str, parts: Parts, note: dict[str, float] | None
) -> TensorResult:
    _, coded = source.coded[name]
    tensors = {(file, coded.parts[part]): tensor for part, tensor in parts.items()}
    tensors |= {(file, unused): source.stored.read(unused) for unused in coded.unused}
    return TensorResult(tensors, note or {})


def _refuse_overflow(name: str, merged: Tensor) -> None:
    if not merged.isfinite().all():
        raise TargetError(
            f"merging {name} gives values that are NaN or Inf: the base holds such values; check the model"
        )
