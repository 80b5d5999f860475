"""One training example as token ids, and the batch that several of them make.

T: tokens of the longest example of a batch, B: examples of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from svdconvert.training.data.images import RowImage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not in the loss."""


@dataclass(frozen=True, slots=True, eq=False)
class RowImages:
    """The images of a row, from which the network's inputs are made for each batch."""

    text: str
    """The text that the processor is given: the row, as far as it is trained on."""
    images: tuple[RowImage, ...]
    """In the order of their places in the text."""
    checksum: str
    """Of what the processor made of the images."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row as tokens, or several rows packed into one sequence."""

    input_ids: Tensor
    """int32, one entry per token."""
    labels: Tensor
    """int32, one entry per token, its own id or IGNORED; for a classifier or regressor a scalar."""
    length: int = 0
    """Number of tokens before the row was truncated."""
    starts: tuple[int, ...] = (0,)
    """Positions at which the packed rows begin."""
    token_types: Tensor | None = None
    """int32, one entry per token: 0 for the first text and 1 for the second, for models that need it."""
    images: RowImages | None = None
    """None for a row without images."""

    @property
    def loss_tokens(self) -> int:
        """The number of terms in the loss. The first token of a row is never predicted, so never counted."""
        return int((self.labels[1:] != IGNORED).sum()) if self.labels.dim() else 1


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token id to pad with. Any id will do, because no position attends to the padding."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """input_ids and labels, int64 (B, T), padded on the right; position_ids if an example is packed.

    No attention mask is needed: a causal model's output at a position does not depend on later positions, so
    padding on the right changes nothing. In packed examples position_ids restart at 0 with every row, which
    is how transformers keeps packed rows from attending to each other.
    """
    ids = pad_sequence([example.input_ids for example in examples], batch_first=True, padding_value=pad_id)
    labels = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORED)
    batch = {"input_ids": ids.long(), "labels": labels.long()}
    if any(len(example.starts) > 1 for example in examples):
        batch["position_ids"] = torch.stack([_position_ids(example, ids.shape[1]) for example in examples])
    return batch


def _position_ids(example: Example, length: int) -> Tensor:
    """0, 1, 2, ... restarting at every packed row and at the padding; `length` entries."""
    starts = [*example.starts, len(example.input_ids), length]
    parts = [torch.arange(end - start) for start, end in zip(starts, starts[1:], strict=False)]
    return torch.cat(parts)
