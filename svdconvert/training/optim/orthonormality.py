"""SORSA's penalty, which keeps the rows of A and the columns of B near orthonormal (arXiv:2409.00055).

    P = mean over all trained A and B of  || A A^T - 1 ||_F  and  || B^T B - 1 ||_F

The norms are not squared, all tensors have equal weight whatever their size, and S does not enter. The
quantity that is minimised is the mean loss over the tokens of a step plus weight * P. The gradient of the
penalty is added once per step in float32, after gradient clipping and loss scaling, so that neither
accumulation nor clipping nor the learning rate nor the precision changes its weight relative to the loss
(docs/adr/0007).

R: rank, X: in features of A, out features of B.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from svdconvert.config.train import TrainOptions
from svdconvert.training.model.adapted_linear import AdaptedLinear
from svdconvert.training.model.expert_branch import ExpertBranch

_OF_EXPERTS = 3  # axes of the factors of several experts
PUBLISHED = 4e-4
"""gamma of SORSA's published script."""


def penalty_weight(options: TrainOptions) -> float:
    """The weight of P relative to the loss; 0 means no penalty.

    By the rule "reference" it is gamma / (lr * accumulate), where gamma is the number in the options. This
    is the effective weight in SORSA's published script, which divides by the peak learning rate on purpose
    and by the number of accumulated passes by accident: gamma 4e-4, rate 3e-5 and 64 passes give 0.208.
    """
    gamma = options.penalty or 0.0
    if not gamma or options.penalty_rule == "weight":
        return gamma
    assert options.lr is not None, "no learning rate: TrainOptions.with_default_lr sets the method's"
    return gamma / (options.lr * options.accumulate)


@dataclass(frozen=True, slots=True)
class Penalty:
    """weight * P over the adapters of a model."""

    weight: float

    @torch.no_grad()
    def add_gradient(self, model: nn.Module) -> float:
        """Add weight * dP to the gradients of all trained A and B; return P without the weight."""
        factors = list(_penalised_factors(model))
        count = sum(len(factor) if factor.dim() == _OF_EXPERTS else 1 for factor, _ in factors)
        return sum(self._add(factor, is_right, count) for factor, is_right in factors) / count

    def _add(self, factor: nn.Parameter, is_right: bool, count: int) -> float:
        """Add the gradient of a factor, (R, I) or (O, R), or of several experts' factors; return the norm."""
        rows_RX = factor if is_right else factor.mT
        error_RR = rows_RX @ rows_RX.mT
        error_RR.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        norms = torch.linalg.matrix_norm(error_RR)
        if not norms.any():
            return 0.0
        # At 0 the norm is not differentiable; 0 is a subgradient.
        weights = torch.where(norms > 0.0, 2.0 * self.weight / (count * norms), 0.0)
        gradient_RX = error_RR @ rows_RX * weights[..., None, None]
        gradient = gradient_RX if is_right else gradient_RX.mT
        factor.grad = gradient.contiguous() if factor.grad is None else factor.grad.add_(gradient)
        return float(norms.sum())


def _penalised_factors(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """(A, True) and (B, False) of every adapter with singular values, if they are trained."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear | ExpertBranch) and module.has_singular_values:
            for name, is_right in (("lora_A", True), ("lora_B", False)):
                factor = module.factor(name)
                if isinstance(factor, nn.Parameter):
                    yield factor, is_right
