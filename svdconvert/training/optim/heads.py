"""What a head on top of an encoder learns: a class, or a number.  B: rows, T: tokens, K: classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pad_sequence

from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.optim.objective import Batch, Predictions
from svdconvert.training.optim.scores import class_scores, number_scores


@dataclass(frozen=True, slots=True)
class WholeRow:
    """A label for every row: cross entropy over classes, or the squared error of a number."""

    pad_id: int
    classes: int
    """0 for a number."""

    def batch(self, rows: Sequence[Example]) -> Batch:
        """input_ids, attention_mask and, where rows have them, token_type_ids: (B, T); labels: (B,)."""
        ids = [row.input_ids for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id).long(),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).long(),
            "labels": torch.stack([row.labels for row in rows]),
        }
        types = [row.types for row in rows if row.types is not None]
        return batch | ({"token_type_ids": pad_sequence(types, batch_first=True).long()} if types else {})

    def masked(self, batch: Batch) -> Batch:
        """The batch with nothing in the loss."""
        return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}

    def loss_sum(
        self, model: nn.Module, plain: nn.Module, batch: Batch, found: Predictions | None = None
    ) -> Tensor:
        """The rows' losses, summed."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        labels_B, logits = batch["labels"], model(**inputs).logits.float()
        wanted_B = labels_B != IGNORED
        guessed_B = logits.argmax(dim=1) if self.classes else logits[:, 0]
        if found is not None:
            pairs = zip(labels_B[wanted_B].tolist(), guessed_B[wanted_B].tolist(), strict=True)
            found += [(float(label), float(guess)) for label, guess in pairs]
        if self.classes:
            return cross_entropy(logits, labels_B, reduction="sum", ignore_index=IGNORED)
        return mse_loss(guessed_B[wanted_B], labels_B[wanted_B].float(), reduction="sum")

    def scores(self, found: Predictions) -> dict[str, float]:
        """Accuracy, F1 and Matthews' correlation of classes; Pearson's and Spearman's of numbers."""
        labels, guesses = [label for label, _ in found], [guess for _, guess in found]
        return class_scores(labels, guesses, self.classes) if self.classes else number_scores(labels, guesses)
