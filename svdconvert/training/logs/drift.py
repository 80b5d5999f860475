"""How far adapters have moved from their initial values: their singular values and singular vectors.

O: out features, I: in features, R: rank. Means over the R singular triplets, then over the matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdconvert.linalg.factors import Factors
from svdconvert.training.model.inject import live_factors


@dataclass(frozen=True, slots=True)
class DriftLog:
    """The distance of the adapters from their initial values after `step` steps."""

    step: int
    sigma_drift: float
    """mean |s - s0| of the singular values, times the adapter's scale."""
    u_rotation: float
    """1 - mean |cos(u, u0)| of the left singular vectors: 0 if none has rotated."""
    v_rotation: float
    """1 - mean |cos(v, v0)| of the right singular vectors."""


@torch.no_grad()
def measure_drift(model: nn.Module, initial: Mapping[str, Factors], step: int) -> DriftLog:
    """Compare the adapters of `model` with their `initial` factors, one layer at a time."""
    drifts = [
        _layer_drift(factors, initial[name], scale, factors.left_OR.device)
        for name, factors, scale in live_factors(model)
    ]
    means = torch.tensor(drifts, dtype=torch.float64).mean(dim=0).tolist()
    return DriftLog(step, *means)


def _layer_drift(
    current: Factors, initial: Factors, scale: float, device: torch.device
) -> tuple[float, float, float]:
    left_OR, sigma_R, right_RI = _triplets(current)
    left0_OR, sigma0_R, right0_RI = _triplets(initial.on(device))
    return (
        scale * float((sigma_R - sigma0_R).abs().mean()),
        1.0 - float(_abs_cosines(left_OR, left0_OR).mean()),
        1.0 - float(_abs_cosines(right_RI.T, right0_RI.T).mean()),
    )


def _triplets(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """(left_OR, sigma_R, right_RI) in float32: the factors (SORSA), else an SVD of their product."""
    if factors.core is not None and factors.core.dim() == 1:
        return factors.left_OR.float(), factors.core.float(), factors.right_RI.float()
    left_OR, right_RI = factors.folded()
    left = torch.linalg.qr(left_OR)
    right = torch.linalg.qr(right_RI.T)
    outer_RR, sigma_R, inner_RR = torch.linalg.svd(left.R @ right.R.T)
    return left.Q @ outer_RR, sigma_R, inner_RR @ right.Q.T


def _abs_cosines(one_XR: Tensor, other_XR: Tensor) -> Tensor:
    """|cos| of the angle between columns of equal index; the sign of a singular vector is arbitrary."""
    return torch.nn.functional.cosine_similarity(one_XR, other_XR, dim=0).abs()
