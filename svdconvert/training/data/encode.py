"""Tokenize rows of text, with only the responses in the loss."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.chats import DATE, prints_date
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.data.prompts import TrainingText, choose_fields, render_row, used_fields
from svdconvert.training.data.rows import FieldSet, Row, valid_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TextRowEncoder:
    """A callable that encodes rows of text."""

    tokenizer: "PreTrainedTokenizerBase"
    options: TrainOptions
    used_fields: set[str] = field(default_factory=set)
    """The fields of the rows encoded last that influence the result."""
    remarks: list[str] = field(default_factory=list)
    """Sentences about how rows are encoded, each once."""

    def __call__(self, rows: Iterable[Row]) -> list[Example | None]:
        """One entry per row, in order; None for a row without a token in the loss.

        The first row decides which fields are used. Raises DataError, which names the row, if a later row
        does not have them, or if the tokenizer has no end-of-sequence token.
        """
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json"
            )
        encoded: list[Example | None] = []
        fields: FieldSet = ()
        for number, row in enumerate(rows, start=1):
            try:
                fields = fields or choose_fields(row, self.options)
                text = render_row(row, fields, self.options, self.tokenizer)
                valid_text(text.text)
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
            encoded.append(_encode(text, self.tokenizer, self.options.max_length))
            if text.is_chat and not self.remarks and prints_date(self.tokenizer):
                self.remarks.append(
                    f"the chat template prints the date; in all rows it is {DATE:%d %B %Y}, so that the same "
                    "command trains on the same text on every day"
                )
        self.used_fields = used_fields(fields, self.options)
        return encoded


def _encode(text: TrainingText, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Example | None:
    if all(start == end for start, end in text.spans):
        return None
    ids, in_loss = _tokenize(text, tokenizer)
    eos = tokenizer.eos_token_id
    last = ids[-1] if ids else None
    if last == eos:
        in_loss[-1] = True
    elif not (text.is_chat and last in tokenizer.added_tokens_decoder):
        # A chat template that ends turns with a special token other than the end-of-sequence token is
        # complete.
        ids.append(eos)
        in_loss.append(True)
    input_ids = torch.tensor(ids[:max_length], dtype=torch.int32)
    labels = input_ids.masked_fill(~torch.tensor(in_loss[:max_length]), IGNORED)
    example = Example(input_ids, labels, len(ids))
    return example if example.loss_tokens else None


def _tokenize(text: TrainingText, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """The tokens of prompt and response, tokenized as one text, and which of them are in the loss.

    A token that straddles the boundary counts as prompt, because it begins there: at inference the prompt is
    tokenized without the response, so the model cannot generate that token.
    """
    # A template that already writes the BOS token must not get a second one from the tokenizer.
    has_bos = bool(tokenizer.bos_token) and text.text.startswith(str(tokenizer.bos_token))
    add_special = not text.is_chat and not has_bos
    if not tokenizer.is_fast:
        return _tokenize_without_offsets(text, tokenizer, add_special)
    # verbose=False suppresses the warning about texts longer than the model's context, which we truncate.
    encoding = tokenizer(
        text.text, add_special_tokens=add_special, return_offsets_mapping=True, verbose=False
    )
    begins = [begin for begin, _ in encoding["offset_mapping"]]
    in_loss = [any(start <= begin < end for start, end in text.spans) for begin in begins]
    return list(encoding["input_ids"]), in_loss


def _tokenize_without_offsets(
    text: TrainingText, tokenizer: "PreTrainedTokenizerBase", add_special: bool
) -> tuple[list[int], list[bool]]:
    """`_tokenize` for tokenizers written in Python, which return no offsets.

    The boundary is found by tokenizing the text before it and comparing with the tokens of the entire text.
    """

    def tokenize(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=add_special, verbose=False)["input_ids"])

    def first_token_after(boundary: int) -> int:
        head = tokenize(text.text[:boundary])
        if add_special and head and head[-1] == tokenizer.eos_token_id:
            head.pop()
        same = next((n for n, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), len(head))
        return same if same == len(head) else same + 1

    ids = tokenize(text.text)
    in_loss = [False] * len(ids)
    for start, end in text.spans:
        last = len(ids) if end == len(text.text) else first_token_after(end)
        for index in range(first_token_after(start), last):
            in_loss[index] = True
    return ids, in_loss
