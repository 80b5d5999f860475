"""The training loss of a batch, summed over the tokens that are in it, for causal language models.

B: rows, T: tokens, V: entries of the vocabulary, N: tokens in the loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svdconvert.training.data.example import IGNORED, Example, collate

Batch = dict[str, Tensor]
Predictions = list[tuple[float, float]]
"""(label, prediction) of every row."""

_CHUNK_ON_CPU = 16
"""Tokens per chunk: 16 rows of 49,152 float32 logits are 3 MB, which stays in the processor's cache."""
_CHUNK_ON_GPU = 4096
"""Tokens per chunk on devices on which the launch of each kernel is the larger cost."""


class Objective(Protocol):
    """How examples become a batch, and a batch becomes a loss."""

    def batch(self, examples: Sequence[Example]) -> Batch:
        """The examples as tensors on the CPU."""

    def masked(self, batch: Batch) -> Batch:
        """The same batch with nothing in the loss."""

    def loss_sum(
        self, model: nn.Module, plain: nn.Module, batch: Batch, predictions: Predictions | None = None
    ) -> Tensor:
        """The float32 loss, summed over everything in the loss; `model` is `plain` as accelerate wraps it.

        The model's predictions are appended to `predictions` if the objective has scores.
        """

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """Name of a score -> its value over all predictions."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """Next-token prediction, as causal language models are trained."""

    pad_id: int

    def batch(self, examples: Sequence[Example]) -> Batch:
        """input_ids, labels and, if examples are packed, position_ids: int64, (B, T)."""
        return collate(examples, self.pad_id)

    def masked(self, batch: Batch) -> Batch:
        """The same batch with nothing in the loss."""
        return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}

    def loss_sum(
        self, model: nn.Module, plain: nn.Module, batch: Batch, predictions: Predictions | None = None
    ) -> Tensor:
        """Cross entropy, summed over the tokens in the loss."""
        # Position t predicts token t + 1, so the last position predicts nothing.
        targets_BT = batch["labels"].roll(-1, dims=1)
        targets_BT[:, -1] = IGNORED
        in_loss_BT = targets_BT != IGNORED
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with _head_restricted_to(in_loss_BT, plain) as is_restricted:
            logits = model(**inputs).logits
        logits_NV = logits.flatten(0, 1) if is_restricted else logits[in_loss_BT]
        return summed_cross_entropy(logits_NV, targets_BT[in_loss_BT])

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """Empty: the loss is the only measure."""
        return {}


@contextmanager
def _head_restricted_to(in_loss_BT: Tensor, model: nn.Module) -> Iterator[bool]:
    """Compute logits only at the given positions, as a single row; yields False if the head is not known.

    The logits are by far the largest activation of a small model, and its head is a fifth of the work;
    those of prompts and padding are not needed.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if not isinstance(head, nn.Module):
        yield False
        return
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][in_loss_BT][None],))
    try:
        yield True
    finally:
        hook.remove()


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """The float32 sum of -log softmax(logits)[target] over the tokens.

    Computed in float32 on a few tokens at a time, so that no float32 copy of all logits exists. The only
    tensor saved for the backward pass is the gradient, in the dtype of the logits.
    """
    total: Tensor = _SummedCrossEntropy.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """The forward pass computes the gradient too, because it has the softmax."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        total = torch.zeros((), device=logits_NV.device)
        gradient_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
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
        ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * grad, None
