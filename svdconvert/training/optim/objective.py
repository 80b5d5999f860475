"""The training loss of a batch, summed over the tokens that are in it, for causal language models.

B: rows, T: tokens, V: entries of the vocabulary, N: tokens in the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from svdconvert.errors import DataError
from svdconvert.training.data.example import IGNORED, Example, collate
from svdconvert.training.data.vision import ImageTextProcessor
from svdconvert.training.optim.cross_entropy import summed_cross_entropy
from svdconvert.training.optim.head import has_plain_head, head_restricted_to, head_skipped

Batch = dict[str, Tensor]
_OF_TEXTS = {"input_ids", "position_ids"}
Predictions = list[tuple[float, float]]
"""(label, prediction) of every row."""


class Objective(Protocol):
    """How examples become a batch, and a batch becomes a loss."""

    def fitted_to(self, plain: nn.Module) -> Self:
        """The same objective, computed in the way that suits the model, which is on its device."""

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
    vision: ImageTextProcessor | None = None
    """Prepares the images of rows; None if no row has any."""
    skips_head: bool = False
    """Compute the loss from the input of the head, so that the logits never exist all at once."""

    def fitted_to(self, plain: nn.Module) -> Self:
        """The same objective; it skips the head if that is a frozen linear layer that gives the logits."""
        return replace(self, skips_head=has_plain_head(plain))

    def batch(self, examples: Sequence[Example]) -> Batch:
        """input_ids, labels and, if examples are packed, position_ids: int64, (B, T).

        For examples with images also what the processor makes of these. Raises DataError if one of them
        cannot be read any more.
        """
        batch = collate(examples, self.pad_id)
        if self.vision is not None and examples[0].images is not None:
            batch |= self.vision.inputs(examples, batch["input_ids"].shape[1])
        return batch

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
        targets_N = targets_BT[in_loss_BT]
        if self.skips_head:
            with head_skipped(in_loss_BT, plain) as found:
                _outputs(model, inputs)
            return found[0].cross_entropy(targets_N)
        with head_restricted_to(in_loss_BT, plain) as is_restricted:
            logits = _outputs(model, inputs).logits
        logits_NV = logits.flatten(0, 1) if is_restricted else logits[in_loss_BT]
        return summed_cross_entropy(logits_NV, targets_N)

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """Empty: the loss is the only measure."""
        return {}


def _outputs(model: nn.Module, inputs: Batch) -> Any:
    """The model's outputs. Raises DataError if it refuses the images, as prepared by a wrong processor."""
    if inputs.keys() <= _OF_TEXTS:
        return model(**inputs)
    try:
        return model(**inputs)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the model cannot use the images as its processor prepares them: {reason}; give the processor "
            "that belongs to the model"
        ) from error
