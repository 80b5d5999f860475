"""What is minimised: the sum of a batch's losses, each counted by the tokens that are in it.

B: rows, T: tokens, V: entries of the vocabulary, N: tokens in the loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svdconvert.training.data.encode import collate
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.optim.crossentropy import summed_cross_entropy

Batch = dict[str, Tensor]
Predictions = list[tuple[float, float]]
"""(true label, the model's) of every row that has one."""


class Objective(Protocol):
    """How rows become a batch, and a batch a loss."""

    def batch(self, rows: Sequence[Example]) -> Batch:
        """The rows as tensors, on the CPU."""

    def masked(self, batch: Batch) -> Batch:
        """The batch with nothing in the loss."""

    def loss_sum(
        self, model: nn.Module, plain: nn.Module, batch: Batch, found: Predictions | None = None
    ) -> Tensor:
        """The loss in float32, summed over all that is in it; `model` is `plain` as accelerate wraps it.

        What the scores are made of is added to `found`.
        """

    def scores(self, found: Predictions) -> dict[str, float]:
        """Measures of all that was found, by name."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """The next token of a text, as causal language models predict it."""

    pad_id: int

    def batch(self, rows: Sequence[Example]) -> Batch:
        """input_ids, labels and, where a row is several texts, position_ids: int64, (B, T)."""
        return collate(rows, self.pad_id)

    def masked(self, batch: Batch) -> Batch:
        """The batch with nothing in the loss."""
        return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}

    def loss_sum(
        self, model: nn.Module, plain: nn.Module, batch: Batch, found: Predictions | None = None
    ) -> Tensor:
        """Cross entropy, summed over the batch's tokens in the loss."""
        # Position t predicts token t + 1, so the last predicts nothing.
        wanted_BT = batch["labels"].roll(-1, dims=1)
        wanted_BT[:, -1] = IGNORED
        chosen_BT = wanted_BT != IGNORED
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with _only_at(chosen_BT, plain) as cut:
            logits = model(**inputs).logits
        logits_NV = logits.flatten(0, 1) if cut else logits[chosen_BT]
        return summed_cross_entropy(logits_NV, wanted_BT[chosen_BT])

    def scores(self, found: Predictions) -> dict[str, float]:
        """None beside the loss."""
        return {}


@contextmanager
def _only_at(chosen_BT: Tensor, model: nn.Module) -> Iterator[bool]:
    """Let the model's head see the chosen positions alone, as one row; False where it cannot be told apart.

    Logits are by far the largest activation of a small model, and its head a fifth of its work; those of
    prompts and padding are not needed.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if not isinstance(head, nn.Module):
        yield False
        return
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][chosen_BT][None],))
    try:
        yield True
    finally:
        hook.remove()
