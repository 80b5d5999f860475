"""Cross entropy of a large vocabulary, with its gradient made on the way.  N: tokens, V: the vocabulary."""

from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 16
"""Tokens. In float32 their logits are to stay in a processor's cache: 16 times 49,152 are 3 MB."""
_ON_DEVICE = 4096
"""The same where there is no such cache, and every kernel has its start to pay for."""


def summed_cross_entropy(logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
    """The float32 sum of -log softmax(logits)[wanted] over the tokens.

    It is computed in float32 a few tokens at a time, so that the logits are never whole in float32, and what
    is kept for the backward pass is the gradient in their own dtype and nothing else.
    """
    total: Tensor = _Summed.apply(logits_NV, wanted_N)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
        total = torch.zeros((), device=logits_NV.device)
        slopes_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        size = _AT_ONCE if logits_NV.device.type == "cpu" else _ON_DEVICE
        for start in range(0, len(wanted_N), size):
            part = slice(start, start + size)
            logs_NV = logits_NV[part].log_softmax(1, dtype=torch.float32)
            index_N1 = wanted_N[part, None]
            total -= logs_NV.gather(1, index_N1).sum()
            if slopes_NV is not None:
                # softmax - 1 at the token that is wanted
                slopes = logs_NV.exp_()
                slopes.scatter_add_(1, index_N1, slopes.new_full(index_N1.shape, -1.0))
                slopes_NV[part] = slopes
        ctx.save_for_backward(slopes_NV)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slopes_NV,) = ctx.saved_tensors
        return slopes_NV * grad, None
