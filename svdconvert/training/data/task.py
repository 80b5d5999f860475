"""What is learnt: the rows as a model reads them, and the objective over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.config.train import TrainOptions
from svdconvert.layouts.base import Layout
from svdconvert.training.data.dataset import DataSplits, read_dataset
from svdconvert.training.data.encode import encode, padding_id
from svdconvert.training.data.labelled import Labelled
from svdconvert.training.model.load import load_tokenizer
from svdconvert.training.optim.heads import WholeRow
from svdconvert.training.optim.objective import NextToken, Objective
from svdconvert.training.optim.scores import require_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """Rows and objective of a plan, for one model."""

    tokenizer: "PreTrainedTokenizerBase"
    examples: DataSplits
    objective: Objective
    labels: Sequence[str] | None = None
    """Names of the classes of a head, none for a number; None where the model's own head is kept."""


def open_training_data(
    weights: Path, layout: Layout, plan: TrainOptions, *, trust_remote_code: bool = False
) -> TrainingData:
    """Read all that the plan names. Raises DataError or CheckpointError where something cannot be used."""
    tokenizer = load_tokenizer(weights, layout, trust_remote_code=trust_remote_code)
    if plan.task != "text":
        require_scores()
        labelled = Labelled(tokenizer, plan)
        examples = read_dataset(plan, labelled)
        objective = WholeRow(padding_id(tokenizer), len(labelled.labels))
        return TrainingData(tokenizer, examples, objective, labelled.labels)
    examples = read_dataset(plan, partial(encode, tokenizer=tokenizer, plan=plan))
    return TrainingData(tokenizer, examples, NextToken(padding_id(tokenizer)))
