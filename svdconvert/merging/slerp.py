"""Spherical interpolation between a base and one other model, tensor by tensor."""

from collections.abc import Sequence
from math import acos, sin

import torch
from torch import Tensor

from svdconvert.merging.base import CHECKPOINTS, MergeMethod, Parameter, Settings

_PARALLEL = 0.9995  # cosine above which the interpolation is linear
_SMALL = 1e-8


def merge(weights: Sequence[Tensor], settings: Settings) -> Tensor:
    """(sin((1 - t) a) W_0 + sin(t a) W_1) / sin(a), with a the angle between W_0 (the base) and W_1.

    (1 - t) W_0 + t W_1 for tensors that are nearly parallel.
    """
    assert settings.base is not None
    first = weights[settings.base]
    second = weights[1 - settings.base]
    t = settings.number("t")
    norms = [float(torch.linalg.vector_norm(tensor)) for tensor in (first, second)]
    divisor = [norm if norm > _SMALL else 1.0 for norm in norms]
    cosine = float(torch.dot((first / divisor[0]).reshape(-1), (second / divisor[1]).reshape(-1)))
    if abs(cosine) > _PARALLEL:
        return first * (1.0 - t) + second * t
    angle = acos(cosine)
    return first * (sin((1.0 - t) * angle) / sin(angle)) + second * (sin(t * angle) / sin(angle))


METHOD = MergeMethod(
    summary="spherical interpolation from the base to one model",
    paper="Shoemake, Animating rotation with quaternion curves, 1985",
    takes=CHECKPOINTS,
    parameters=(Parameter(name="t", default=0.5, required=True, summary="0 is the base, 1 the other model"),),
    weights=merge,
    most=1,
)
