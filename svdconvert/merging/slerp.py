"""Spherical interpolation between a base and one other model, tensor by tensor."""

from collections.abc import Iterator
from math import acos, sin, sqrt

import torch
from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, Blocks, MergeMethod, Parameter, Settings

_PARALLEL = 0.9995  # cosine above which the interpolation is linear
_SMALL = 1e-8


def merge(blocks: Blocks, settings: Settings) -> Iterator[Tensor]:
    """The sum of both tensors with the shares sin((1 - t) a) / sin(a) and sin(t a) / sin(a).

    a is the angle between W_0 (the base) and W_1. For tensors that are nearly parallel the shares are 1 - t
    and t.
    """
    assert settings.base is not None
    t = settings.number("t")
    cosine = _cosine(blocks)
    shares = (1.0 - t, t)
    if abs(cosine) <= _PARALLEL:
        angle = acos(cosine)
        shares = (sin((1.0 - t) * angle) / sin(angle), sin(t * angle) / sin(angle))
    for weights in blocks:
        total = weights[settings.base] * shares[0]
        yield total.add_(weights[1 - settings.base], alpha=shares[1])


def _cosine(blocks: Blocks) -> float:
    """Of the angle between both tensors."""
    squares = [0.0, 0.0]
    product = 0.0
    for weights in blocks:
        first, second = (part.reshape(-1) for part in weights)
        squares[0] += float(torch.dot(first, first))
        squares[1] += float(torch.dot(second, second))
        product += float(torch.dot(first, second))
    norms = [norm if norm > _SMALL else 1.0 for norm in map(sqrt, squares)]
    return product / norms[0] / norms[1]


METHOD = MergeMethod(
    summary="spherical interpolation from the base to one model",
    paper="Shoemake, Animating rotation with quaternion curves, 1985",
    takes=CHECKPOINTS,
    parameters=(Parameter(name="t", default=0.5, required=True, summary="0 is the base, 1 the other model"),),
    weights=merge,
    most=1,
)
