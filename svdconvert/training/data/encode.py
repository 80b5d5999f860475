"""Tokenize rows of text, also with images, with only the responses in the loss."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.chats import DATE, prints_date
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.data.image_chats import read_image_chat
from svdconvert.training.data.images import IMAGE_FIELDS, has_images
from svdconvert.training.data.prompts import (
    TrainingText,
    chat_text,
    choose_fields,
    prompt_format,
    render_row,
    used_fields,
    with_prompt_loss,
)
from svdconvert.training.data.rows import FieldSet, Row, valid_text
from svdconvert.training.data.tokens import tokenize, with_end
from svdconvert.training.data.vision import ImageTextProcessor, encode_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TextRowEncoder:
    """A callable that encodes rows of text, and rows with images if the model takes images."""

    tokenizer: "PreTrainedTokenizerBase"
    options: TrainOptions
    load_vision: Callable[[], ImageTextProcessor] | None = None
    """Loads the model's processor; None for a model of texts, which ignores the images of rows."""
    used_fields: set[str] = field(default_factory=set)
    """The fields of the rows encoded last that influence the result."""
    unused_keys: dict[str, None] = field(default_factory=dict)
    """The keys of messages in the rows encoded last that the chat template did not use in one of them."""
    remarks: list[str] = field(default_factory=list)
    """Sentences about how rows are encoded, each once."""
    prompt_format: str | None = None
    """How the model is asked after training on the rows encoded first; None if they have images."""

    @cached_property
    def vision(self) -> ImageTextProcessor:
        """The model's processor, loaded for the first row with images."""
        assert self.load_vision is not None
        return self.load_vision()

    def __call__(self, rows: Iterable[Row], folder: Path | None = None) -> list[Example | None]:
        """One entry per row, in order; None for a row without a token in the loss.

        The first row decides which fields are used. Paths of images are relative to `folder`. Raises
        DataError, which names the row, if a later row does not have these fields, if an image cannot be used,
        or if the tokenizer has no end-of-sequence token.
        """
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json"
            )
        encoded: list[Example | None] = []
        fields: FieldSet = ()
        self.used_fields = set()
        self.unused_keys = {}
        for number, row in enumerate(rows, start=1):
            try:
                fields = fields or choose_fields(row, self.options)
                encoded.append(self._encode(row, fields, folder))
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
        self.used_fields |= used_fields(fields, self.options)
        if fields and self.load_vision is None and self.prompt_format is None:
            self.prompt_format = prompt_format(fields, self.options)
        return encoded

    def _encode(self, row: Row, fields: FieldSet, folder: Path | None) -> Example | None:
        if self.load_vision is not None and has_images(row, fields[0]):
            self.used_fields.update(IMAGE_FIELDS)
            chat, images = read_image_chat(row, fields, self.options, folder)
            text = with_prompt_loss(chat_text(chat, self.vision.tokenizer), self.options)
            self.unused_keys.update(dict.fromkeys(text.unused))
            if images:
                self._note_date(text)
                return encode_row(text, images, self.vision, self.options.max_length)
        else:
            text = render_row(row, fields, self.options, self.tokenizer)
            self.unused_keys.update(dict.fromkeys(text.unused))
        valid_text(text.text)
        self._note_date(text)
        return _encode(text, self.tokenizer, self.options.max_length)

    def _note_date(self, text: TrainingText) -> None:
        if text.is_chat and not self.remarks and prints_date(self.tokenizer):
            self.remarks.append(
                f"the chat template prints the date; in all rows it is {DATE:%d %B %Y}, so that the same "
                "command trains on the same text on every day"
            )


def _encode(text: TrainingText, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Example | None:
    if all(start == end for start, end in text.spans):
        return None
    # A template that already writes the BOS token must not get a second one from the tokenizer.
    has_bos = bool(tokenizer.bos_token) and text.text.startswith(str(tokenizer.bos_token))
    ids, in_loss = tokenize(text, tokenizer, not text.is_chat and not has_bos)
    with_end(ids, in_loss, tokenizer, is_chat=text.is_chat)
    input_ids = torch.tensor(ids[:max_length], dtype=torch.int32)
    labels = input_ids.masked_fill(~torch.tensor(in_loss[:max_length]), IGNORED)
    example = Example(input_ids, labels, len(ids))
    return example if example.loss_tokens else None
