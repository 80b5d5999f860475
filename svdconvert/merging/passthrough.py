"""Passthrough: the tensors of one model, for slices of layers from several models."""

from collections.abc import Sequence

from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, MergeMethod, Parameter, Settings


def merge(weights: Sequence[Tensor], settings: Settings) -> Tensor:
    """scale * W."""
    return weights[0] * settings.numbers("scale")[0]


METHOD = MergeMethod(
    summary="the tensors of one model, also slices of layers",
    paper="mergekit",
    takes=CHECKPOINTS,
    parameters=(Parameter(name="scale", default=1.0, per_model=True, summary="factor of the tensor"),),
    weights=merge,
    by_entry=True,
    base="none",
    most=1,
)
