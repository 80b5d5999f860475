"""Rows with images as tokens, and the tensors of their images, both by the model's own processor.

A processor of transformers replaces the place of an image in a text by as many tokens as the image has
features. How it does so differs from model to model, so the tokens of the answers are found by comparing what
it returns with the tokens of the text alone. The tensors of the images, which are large, are not kept: a row
keeps its text and its images as files, and each batch prepares them again.

T: tokens of a row.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from xxhash import xxh3_64

from svdconvert.checkpoint.tensors import tensor_bytes
from svdconvert.errors import DataError
from svdconvert.training.data.example import IGNORED, Example, RowImages
from svdconvert.training.data.images import RowImage
from svdconvert.training.data.prompts import TrainingText
from svdconvert.training.data.tokens import tokenize, with_end

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

_OF_TOKENS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class ImageTextProcessor:
    """A processor of transformers that takes texts and images."""

    processor: Any
    place: str
    """What the chat template writes in the place of an image."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, with the processor's chat template."""
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        return tokenizer

    def adds_special_tokens(self, text: str) -> bool:
        """As `apply_chat_template` of transformers' processors: unless the template has written them."""
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(str(bos)))

    def call(self, texts: Sequence[str], images: "Sequence[Sequence[Image]]") -> dict[str, Tensor]:
        """The processor's output for texts with their images; tokens are padded on the right.

        Raises DataError if the processor refuses them.
        """
        try:
            output = self.processor(
                text=list(texts),
                images=[list(row) for row in images],
                padding=len(texts) > 1,
                padding_side="right",
                add_special_tokens=self.adds_special_tokens(texts[0]),
                return_tensors="pt",
            )
        except Exception as error:  # processors raise errors of many kinds
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(f"{type(self.processor).__name__} refuses its images: {reason}") from error
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}

    def inputs(self, examples: Sequence[Example], length: int) -> dict[str, Tensor]:
        """What the network needs for the images of `examples`, whose batch has `length` tokens.

        Raises DataError if an image cannot be read any more, or has changed.
        """
        rows = [example.images for example in examples if example.images is not None]
        assert len(rows) == len(examples), "rows with images and rows without are in separate batches"
        output = self.call(
            [row.text for row in rows], [[image.open() for image in row.images] for row in rows]
        )
        ids_BT = output["input_ids"]
        for ids_T, example in zip(ids_BT, examples, strict=True):
            count = min(len(ids_T), len(example.input_ids))
            if not torch.equal(ids_T[:count].int(), example.input_ids[:count]):
                raise DataError(
                    f"{type(self.processor).__name__} makes other tokens of a row alone than of rows in a "
                    "batch; train with a `batch_size` of 1"
                )
        batch = {name: _fitted(tensor, ids_BT, length) for name, tensor in output.items()}
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        mask_BT = (torch.arange(length) < lengths[:, None]).long()
        return {name: tensor for name, tensor in batch.items() if name not in _OF_TOKENS} | {
            "attention_mask": mask_BT
        }


def _fitted(tensor: Tensor, ids_BT: Tensor, length: int) -> Tensor:
    """A tensor with an entry for every token of a batch, cut or padded with zeros to `length` tokens.

    Other tensors are returned as they are.
    """
    if tensor.dim() < 2 or tensor.shape[:2] != ids_BT.shape:
        return tensor
    missing = length - tensor.shape[1]
    if missing <= 0:
        return tensor[:, :length]
    zeros = tensor.new_zeros((tensor.shape[0], missing, *tensor.shape[2:]))
    return torch.cat([tensor, zeros], dim=1)


def encode_row(
    text: TrainingText, images: Sequence[RowImage], vision: ImageTextProcessor, max_length: int
) -> Example | None:
    """A rendered chat with its images as tokens, only its answers in the loss; None if none is left.

    A row longer than `max_length` is cut before the first image that does not fit as a whole. Raises
    DataError if the processor refuses the row, or if its answers cannot be located in what it returns.
    """
    opened = [image.open() for image in images]
    row = _encode(text, opened, vision)
    length = len(row.ids)
    kept = row.images_within(max_length)
    if length > max_length and kept < len(images):
        if kept == 0:
            return None
        end = _places(text.text, vision.place)[kept]
        text = replace(text, text=text.text[:end], spans=_clipped(text.spans, end))
        row = _encode(text, opened[:kept], vision, is_cut=True)
    input_ids = torch.tensor(row.ids[:max_length], dtype=torch.int32)
    labels = input_ids.masked_fill(~torch.tensor(row.in_loss[:max_length]), IGNORED)
    of_images = RowImages(text.text, tuple(images[:kept]), row.checksum)
    example = Example(input_ids, labels, length, images=of_images)
    return example if example.loss_tokens else None


@dataclass
class _EncodedRow:
    ids: list[int]
    in_loss: list[bool]
    checksum: str = ""
    """Of the images as the network will get them."""
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(number of images up to its end, position of its end) of every run of tokens of images."""

    def images_within(self, length: int) -> int:
        """How many images have all their tokens among the first `length`."""
        return max((count for count, end in self.runs if end <= length), default=0)


def _encode(
    text: TrainingText, images: "Sequence[Image]", vision: ImageTextProcessor, *, is_cut: bool = False
) -> _EncodedRow:
    places = _places(text.text, vision.place)
    if len(places) != len(images):
        raise DataError(
            f"the chat template writes {len(places)} places ({vision.place!r}) for its {len(images)} images; "
            "remove such texts from the row, or use a processor whose chat template writes one for each image"
        )
    output = vision.call([text.text], [images])
    ids = [int(token) for token in output["input_ids"][0]]
    row = _EncodedRow(ids, [False] * len(ids), _checksum(output))
    _mark_before(row, text, places[0], vision)
    stops = [*places[1:], len(text.text)]
    for index, (place, stop) in enumerate(zip(places, stops, strict=True)):
        is_last = stop == len(text.text)
        if is_last or any(start < stop and end > place for start, end in text.spans):
            _mark_after(row, text, (index, stop), images, vision)
    if not is_cut:
        with_end(row.ids, row.in_loss, vision.tokenizer, is_chat=True)
    return row


def _mark_before(row: _EncodedRow, text: TrainingText, place: int, vision: ImageTextProcessor) -> None:
    """Mark what is in the loss before the first image."""
    before = replace(text, text=text.text[:place], spans=_clipped(text.spans, place))
    if not before.spans:
        return
    ids, in_loss = tokenize(before, vision.tokenizer, vision.adds_special_tokens(text.text))
    if ids and ids != row.ids[: len(ids)] and ids[-1] == vision.tokenizer.eos_token_id:
        ids = ids[:-1]
        in_loss = in_loss[:-1]
    same = _common(ids, row.ids)
    _require_located(in_loss[same:])
    row.in_loss[:same] = in_loss[:same]


def _mark_after(
    row: _EncodedRow,
    text: TrainingText,
    part: tuple[int, int],
    images: "Sequence[Image]",
    vision: ImageTextProcessor,
) -> None:
    """Mark what is in the loss after an image, up to the next one.

    `part` is (number of the image, end of the part in characters). The tokens of a text that ends there are
    compared with and without the images, from their ends.
    """
    index, stop = part
    head = replace(text, text=text.text[:stop], spans=_clipped(text.spans, stop))
    expanded = row.ids
    if stop < len(text.text):
        expanded = [int(token) for token in vision.call([head.text], [images[: index + 1]])["input_ids"][0]]
    plain, in_loss = tokenize(head, vision.tokenizer, vision.adds_special_tokens(text.text))
    same = _common(plain[::-1], expanded[::-1])
    place_id = vision.tokenizer.convert_tokens_to_ids(vision.place)
    after = len(plain) - 1 - plain[::-1].index(place_id) if place_id in plain else 0
    same = min(same, len(plain) - 1 - after)
    first = len(expanded) - same
    if expanded[first:] != row.ids[first : len(expanded)]:
        same = 0
    _require_located(in_loss[after + 1 : len(plain) - same])
    row.in_loss[first : len(expanded)] = in_loss[len(plain) - same :]
    row.runs.append((index + 1, first))


def _require_located(in_loss: Sequence[bool]) -> None:
    if any(in_loss):
        raise DataError(
            "the tokens of its answers cannot be located next to those of its images; put images into "
            "messages of the user only"
        )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of equal entries at the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _places(text: str, place: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(place), text)]


def _clipped(spans: Sequence[tuple[int, int]], end: int) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(stop, end)) for start, stop in spans if start < end)


def _checksum(output: dict[str, Tensor]) -> str:
    """A checksum of what the processor made of the images of a row."""
    total = xxh3_64()
    for name in sorted(output):
        if name not in _OF_TOKENS:
            total.update(f"{name} {tuple(output[name].shape)}".encode())
            total.update(tensor_bytes(output[name]))
    return total.hexdigest()
