"""How far an adapter has moved from its start: its singular values, and the directions that go with them.

O: out features, I: in features, R: rank. Averages over the R triplets, then over the matrices.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdconvert.config.train import TrainOptions
from svdconvert.linalg.factors import Factors
from svdconvert.training.model.inject import adapted_layers
from svdconvert.training.optim.loop import EvalLog, StepLog


@dataclass(frozen=True, slots=True)
class DriftLog:
    """How far the adapters are from their start after `step` steps."""

    step: int
    sigma_drift: float
    """mean |s - s0|, of the singular values with the scale."""
    u_rotation: float
    """1 - mean |cos(u, u0)| of the left singular vectors: 0 where none has turned."""
    v_rotation: float
    """The same of the right ones."""


def with_drift(
    logs: Iterator[StepLog | EvalLog | DriftLog],
    model: nn.Module,
    start: Mapping[str, Factors],
    plan: TrainOptions,
    steps: int,
) -> Iterator[StepLog | EvalLog | DriftLog]:
    """The logs, and the drift behind the steps of the held-out losses and the last."""
    for log in logs:
        yield log
        due = log.step == steps or (plan.eval_every and log.step % plan.eval_every == 0)
        if isinstance(log, StepLog) and due:
            yield drift(model, start, log.step)


@torch.no_grad()
def drift(model: nn.Module, start: Mapping[str, Factors], step: int) -> DriftLog:
    """Compare the adapters of `model` with their start, one layer at a time."""
    moves = [
        _move(layer.pieces_now(), start[path], layer.scale, layer.base.weight.device)
        for path, layer in adapted_layers(model)
    ]
    means = torch.tensor(moves, dtype=torch.float64).mean(dim=0).tolist()
    return DriftLog(step, *means)


def _move(now: Factors, then: Factors, scale: float, device: torch.device) -> tuple[float, float, float]:
    left, sigma, right = _triplets(now)
    left0, sigma0, right0 = _triplets(then.on(device))
    return (
        scale * float((sigma - sigma0).abs().mean()),
        1.0 - float(_cosines(left, left0).mean()),
        1.0 - float(_cosines(right.T, right0.T).mean()),
    )


def _triplets(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """(left_OR, sigma_R, right_RI) in float32: as they stand (SORSA), else of the product."""
    if factors.core is not None and factors.core.dim() == 1:
        return factors.left_OR.float(), factors.core.float(), factors.right_RI.float()
    left, right = (torch.linalg.qr(side) for side in (factors.folded()[0], factors.folded()[1].T))
    outer, sigma, inner = torch.linalg.svd(left.R @ right.R.T)
    return left.Q @ outer, sigma, inner @ right.Q.T


def _cosines(one_XR: Tensor, other_XR: Tensor) -> Tensor:
    """|cos| between columns of the same number; their signs are nobody's."""
    return torch.nn.functional.cosine_similarity(one_XR, other_XR, dim=0).abs()
