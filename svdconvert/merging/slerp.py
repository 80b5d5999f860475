"""Spherical interpolation between a base and one other model, tensor by tensor."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import acos, sin, sqrt

import torch
from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, MergeMethod, Parameter, Settings

_PARALLEL = 0.9995  # cosine above which the interpolation is linear
_SMALL = 1e-8


def measure(blocks: Iterable[Sequence[Tensor]], settings: Settings) -> Settings:
    """The shares sin((1 - t) a) / sin(a) and sin(t a) / sin(a) of two tensors that are given in blocks.

    a is the angle between W_0 (the base) and W_1. For tensors that are nearly parallel the shares are 1 - t
    and t.
    """
    assert settings.base is not None
    squares = [0.0, 0.0]
    product = 0.0
    for block in blocks:
        parts = [part.reshape(-1) for part in (block[settings.base], block[1 - settings.base])]
        squares = [sum + float(torch.dot(part, part)) for sum, part in zip(squares, parts, strict=True)]
        product += float(torch.dot(*parts))
    norms = [norm if norm > _SMALL else 1.0 for norm in map(sqrt, squares)]
    cosine = product / norms[0] / norms[1]
    t = settings.number("t")
    if not abs(cosine) <= _PARALLEL:
        return replace(settings, shared={**settings.shared, "first": 1.0 - t, "second": t})
    angle = acos(cosine)
    shares = {"first": sin((1.0 - t) * angle) / sin(angle), "second": sin(t * angle) / sin(angle)}
    return replace(settings, shared={**settings.shared, **shares})


def merge(weights: Sequence[Tensor], settings: Settings) -> Tensor:
    """The sum of both tensors, with the shares that were measured of them, or else of these entries."""
    assert settings.base is not None
    if "first" not in settings.shared:
        return merge(weights, measure([weights], settings))
    first = weights[settings.base] * settings.number("first")
    return first.add_(weights[1 - settings.base], alpha=settings.number("second"))


METHOD = MergeMethod(
    summary="spherical interpolation from the base to one model",
    paper="Shoemake, Animating rotation with quaternion curves, 1985",
    takes=CHECKPOINTS,
    parameters=(Parameter(name="t", default=0.5, required=True, summary="0 is the base, 1 the other model"),),
    weights=merge,
    measure=measure,
    by_entry=True,
    most=1,
)
