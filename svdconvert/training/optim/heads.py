"""The loss and the scores of a classifier or regressor on top of an encoder.  B: rows, T: tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Self

from svdconvert.errors import MissingPackageError
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.optim.objective import Batch, Predictions


@dataclass(frozen=True, slots=True)
class SequenceLabel:
    """One label per row: cross entropy over classes, or the squared error of a number."""

    pad_id: int
    classes: int
    """0 for regression."""

    def fitted_to(self, plain: nn.Module) -> Self:
        """This objective itself: it is computed in the same way for all models."""
        return self

    def batch(self, examples: Sequence[Example]) -> Batch:
        """input_ids, attention_mask and, if the examples have them, token_type_ids: (B, T); labels: (B,)."""
        ids = [example.input_ids for example in examples]
        masks = [torch.ones_like(row) for row in ids]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id).long(),
            "attention_mask": pad_sequence(masks, batch_first=True).long(),
            "labels": torch.stack([example.labels for example in examples]),
        }
        types = [example.token_types for example in examples if example.token_types is not None]
        if types:
            batch["token_type_ids"] = pad_sequence(types, batch_first=True).long()
        return batch

    def masked(self, batch: Batch) -> Batch:
        """The same batch with nothing in the loss."""
        return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}

    def loss_sum(
        self, model: nn.Module, plain: nn.Module, batch: Batch, predictions: Predictions | None = None
    ) -> Tensor:
        """The losses of the rows, summed; labels and predictions are appended to `predictions`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        labels_B = batch["labels"]
        logits = model(**inputs).logits.float()
        in_loss_B = labels_B != IGNORED
        predicted_B = logits.argmax(dim=1) if self.classes else logits[:, 0]
        if predictions is not None:
            pairs = zip(labels_B[in_loss_B].tolist(), predicted_B[in_loss_B].tolist(), strict=True)
            predictions += [(float(label), float(predicted)) for label, predicted in pairs]
        if self.classes:
            return cross_entropy(logits, labels_B, reduction="sum", ignore_index=IGNORED)
        return mse_loss(predicted_B[in_loss_B], labels_B[in_loss_B].float(), reduction="sum")

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """Accuracy, F1 and Matthews correlation for classes; Pearson and Spearman correlation for numbers."""
        labels = [label for label, _ in predictions]
        predicted = [value for _, value in predictions]
        if self.classes:
            return class_scores(labels, predicted, self.classes)
        return number_scores(labels, predicted)


def require_scores() -> None:
    """Raise MissingPackageError if scikit-learn, which computes the scores, is not installed."""
    if find_spec("sklearn") is None:
        raise MissingPackageError('the scores need scikit-learn: pip install "svdconvert[scores]"')


def class_scores(labels: Sequence[float], predicted: Sequence[float], classes: int) -> dict[str, float]:
    """accuracy, f1 and matthews, by scikit-learn.

    F1 is that of class 1 if there are two classes, as in GLUE, else the mean over the classes. The Matthews
    correlation is 0 if only one class occurs.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    average = "binary" if classes == 2 else "macro"
    has_several = len({*labels, *predicted}) > 1
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0.0)),
        "matthews": float(matthews_corrcoef(labels, predicted)) if has_several else 0.0,
    }


def number_scores(labels: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """pearson and spearman, by scipy; 0 if the labels or the predictions are constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(set(labels)) < 2 or len(set(predicted)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    scores = {
        "pearson": float(pearsonr(labels, predicted)[0]),
        "spearman": float(spearmanr(labels, predicted)[0]),
    }
    return {name: value if isfinite(value) else 0.0 for name, value in scores.items()}
