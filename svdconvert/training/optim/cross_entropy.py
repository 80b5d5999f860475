"""The cross entropy of logits, and of a linear head without its logits, summed over tokens.

N: tokens in the loss, V: entries of the vocabulary, H: width of the hidden states.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_CHUNK_ON_CPU = 16
"""Tokens per chunk: 16 rows of 49,152 float32 logits are 3 MB, which stays in the processor's cache."""
_CHUNK_ON_GPU = 4096
"""Tokens per chunk on devices on which the launch of each kernel is the larger cost."""
_LOGITS_ON_CPU = 2**24
"""Logits of a head that exist at once: 32 MB in bfloat16, enough tokens for an efficient product."""
_LOGITS_ON_GPU = 2**26


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The float32 sum of -log softmax(logits)[target] over the tokens.

    Computed in float32 on a few tokens at a time, so that no float32 copy of all logits exists. The only
    tensor saved for the backward pass is the gradient, in the dtype of the logits.
    """
    total: Tensor = _SummedCrossEntropy.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return total


def head_cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor
) -> Tensor:
    """`summed_cross_entropy` of the logits linear(hidden, weight, bias), of which only a part exists at once.

    Weight and bias are frozen, and all three have the same dtype. The only tensor saved for the backward pass
    is the gradient of the hidden states.
    """
    total: Tensor = _HeadCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias_V, targets_N
    )
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradient too, because it has the softmax."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        total = torch.zeros((), device=logits_NV.device)
        gradient_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        _add_cross_entropy(total, logits_NV, targets_N, gradient_NV)
        ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * grad, None


class _HeadCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradient too, so that the backward pass needs no logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=hidden_NH.device)
        gradient_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        most = _LOGITS_ON_CPU if hidden_NH.device.type == "cpu" else _LOGITS_ON_GPU
        # A multiple of the smaller chunks, so that these are the same as for all logits at once.
        size = max(1, most // len(weight_VH) // _CHUNK_ON_CPU) * _CHUNK_ON_CPU
        for start in range(0, len(targets_N), size):
            chunk = slice(start, start + size)
            logits_CV = linear(hidden_NH[chunk], weight_VH, bias_V)
            # The gradient replaces the logits.
            _add_cross_entropy(total, logits_CV, targets_N[chunk], None if gradient_NH is None else logits_CV)
            if gradient_NH is not None:
                torch.mm(logits_CV, weight_VH, out=gradient_NH[chunk])
        ctx.save_for_backward(gradient_NH)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * grad, None, None, None


def _add_cross_entropy(
    total: Tensor, logits_NV: Tensor, targets_N: Tensor, gradient_NV: Tensor | None
) -> None:
    """Add the cross entropies to `total`; write their gradient to `gradient_NV`, which may be the logits."""
    size = _CHUNK_ON_CPU if logits_NV.device.type == "cpu" else _CHUNK_ON_GPU
    for start in range(0, len(targets_N), size):
        chunk = slice(start, start + size)
        log_softmax = logits_NV[chunk].log_softmax(1, dtype=torch.float32)
        index_N1 = targets_N[chunk, None]
        total -= log_softmax.gather(1, index_N1).sum()
        if gradient_NV is not None:
            # The gradient is the softmax, minus 1 at the target.
            softmax = log_softmax.exp_()
            softmax.scatter_add_(1, index_N1, softmax.new_full(index_N1.shape, -1.0))
            gradient_NV[chunk] = softmax
