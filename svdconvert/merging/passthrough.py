"""Passthrough: the tensors of one model, for slices of layers from several models."""

from collections.abc import Iterator

from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, Blocks, MergeMethod, Parameter, Settings


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """scale * W."""
    return (weights[0] * settings.numbers("scale")[0] for weights in blocks)


METHOD = MergeMethod(
    summary="the tensors of one model, also slices of layers",
    paper="mergekit",
    takes=CHECKPOINTS,
    parameters=(Parameter(name="scale", default=1.0, per_model=True, summary="factor of the tensor"),),
    weights=merge,
    base="none",
    most=1,
)
