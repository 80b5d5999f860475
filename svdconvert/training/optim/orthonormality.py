"""SORSA's penalty: A's rows and B's columns are kept near orthonormal (arXiv:2409.00055).  R: rank.

    P = mean over all trained A and B of  || A A^T - 1 ||_F  and  || B^T B - 1 ||_F

with the norms as they are, not squared, every tensor counted alike whatever its size, and S in none of
them. What is minimised is the mean loss of a step's tokens plus weight * P. The penalty's gradient is added
once a step, behind clipping and any loss scale, in float32: so neither accumulation nor clipping nor the
learning rate nor the precision changes its weight beside the loss's (docs/adr/0007).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from svdconvert.config.train import TrainOptions
from svdconvert.training.model.adapted_linear import AdaptedLinear

PUBLISHED = 4e-4
"""gamma of SORSA's published script."""


def penalty_weight(plan: TrainOptions) -> float:
    """The weight of P beside the loss, 0 where the plan has none.

    By the rule "reference" the plan's number gamma counts gamma / (lr * accumulate). That is what SORSA's
    published script makes of it, which divides by the peak rate on purpose and by the accumulated passes by
    accident: gamma 4e-4, rate 3e-5 and 64 passes there make 0.208.
    """
    gamma = plan.penalty or 0.0
    if not gamma or plan.penalty_rule == "weight":
        return gamma
    assert plan.lr is not None, "the plan has no rate: TrainPlan.with_rate fills in the method's"
    return gamma / (plan.lr * plan.accumulate)


@dataclass(frozen=True, slots=True)
class Penalty:
    """The penalty of a model's adapters."""

    weight: float

    @torch.no_grad()
    def add_gradient(self, model: nn.Module) -> float:
        """Add weight * dP to the gradients of all trained A and B; return P as it was."""
        sides = list(_sides(model))
        norms = [self._add(piece, flat, len(sides)) for piece, flat in sides]
        return sum(norms) / len(sides)

    def _add(self, piece: nn.Parameter, flat: bool, count: int) -> float:
        rows_RX = piece if flat else piece.T
        error_RR = rows_RX @ rows_RX.T
        error_RR.diagonal().sub_(1.0)
        norm = float(torch.linalg.vector_norm(error_RR))
        if norm > 0.0:  # where it is zero, so is the least of its gradients
            slope_RX = error_RR @ rows_RX * (2.0 * self.weight / (count * norm))
            slope = slope_RX if flat else slope_RX.T
            piece.grad = slope.contiguous() if piece.grad is None else piece.grad.add_(slope)
        return norm


def _sides(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """(A, True) and (B, False) of every adapter with singular values of its own, as far as they train."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and module.has_spectrum:
            for name, flat in (("lora_A", True), ("lora_B", False)):
                piece = module.get(name)
                if isinstance(piece, nn.Parameter):
                    yield piece, flat
