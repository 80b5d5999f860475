"""merge --keep-format: an adapted matrix of a quantised base is quantised again by the format's own rule."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import RecipeError, TargetError
from svdconvert.inputs.model import OpenModel
from svdconvert.linalg.delta import Product, measured, merged_
from svdconvert.pipeline.runner import TensorResult
from svdconvert.quantization.base import Parts
from svdconvert.quantization.view import DecodedSource


def keep_format(model: OpenModel, changed: Collection[str]) -> DecodedSource:
    """The model with only the `changed` quantised weights decoded: all others stay as they are stored.

    Raises RecipeError if no weight of the model is quantised, TargetError if a changed one is in a format
    that cannot be written.
    """
    source = model.source
    if not isinstance(source, DecodedSource):
        raise RecipeError(
            f"--keep-format changes nothing here: no weight of {model.path} is quantised; leave it out"
        )
    for name in changed:
        plugin, coded = source.coded.get(name, (None, None))
        if plugin is not None and coded is not None and not plugin.encodes:
            raise TargetError(
                f"{name} of {model.path} is stored as {plugin.title(coded)}, which needs more than the "
                "weights to be written; leave out --keep-format, or convert the adapter with to-lora"
            )
    return source.only(changed)


def stored_groups(
    source: DecodedSource, dtypes: Mapping[str, str], added: Iterable[TensorInfo]
) -> Iterator[tuple[TensorInfo, ...]]:
    """The tensors that are written, those of one quantised weight together, so that they share a shard.

    `dtypes` has the new element types of tensors that are not quantised; the `added` ones come last.
    """
    for name, info in source.infos.items():
        if name in source.coded:
            yield tuple(source.stored.infos[stored] for stored in source.coded[name][1].stored)
        else:
            yield (replace(info, dtype=dtypes.get(name, info.dtype)),)
    yield from ((info,) for info in added)


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
