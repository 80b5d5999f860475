"""The labels that a classifier predicts.  B: rows of the batch, T: tokens, C: classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from svdconvert.evaluation.answering import Answer, context_length
from svdconvert.evaluation.base import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FAR = 1 << 20
"""transformers gives a tokenizer without a limit a much larger one."""


@dataclass(frozen=True)
class Classifier:
    """A network with a head, which answers with the name of a class, or with a number."""

    network: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    labels: Sequence[str]
    """The names of the classes, in order; empty for one number."""

    def most_tokens(self) -> int:
        """The length at which texts are cut off, the longer of two first."""
        context = context_length(self.network) or _FAR
        config: Any = self.network.config
        if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "xmod"):
            context -= int(config.pad_token_id) + 1  # their positions begin behind that of the padding
        limit = getattr(self.tokenizer, "model_max_length", _FAR)
        return min(context, limit if isinstance(limit, int) else _FAR)

    def encode(self, rows: Sequence[Row]) -> list[dict[str, list[int]]]:
        """What the tokenizer makes of every row, cut off at `most_tokens`."""
        most = self.most_tokens()
        encode: Any = self.tokenizer
        texts = [
            [row.prompt, row.extra["second"]] if row.extra.get("second") else [row.prompt] for row in rows
        ]
        return [dict(encode(*pair, truncation="longest_first", max_length=most)) for pair in texts]

    @torch.no_grad()
    def answers(self, encodings: Sequence[Mapping[str, Sequence[int]]]) -> list[Answer]:
        """The answers to one batch of encoded rows."""
        device = next(self.network.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in self._batch(encodings).items()}
        logits_BC: Tensor = self.network(**inputs).logits.float()
        if not self.labels:
            return [Answer(repr(value), 0, "end") for value in logits_BC[:, 0].tolist()]
        return [Answer(self.labels[number], 0, "end") for number in logits_BC.argmax(dim=1).tolist()]

    def _batch(self, encodings: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """(B, T) tensors, padded on the right."""
        pads = {"input_ids": self._pad_id()}
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {
            name: pad_sequence(
                [torch.tensor(list(one[name])) for one in encodings],
                batch_first=True,
                padding_value=pads.get(name, 0),
            )
            for name in names
            if name in encodings[0]
        }

    def _pad_id(self) -> int:
        config: Any = self.network.config
        candidates = (config.pad_token_id, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        found = next((number for number in candidates if isinstance(number, int)), 0)
        config.pad_token_id = found  # by which a decoder with a head finds the last token of a row
        return found
