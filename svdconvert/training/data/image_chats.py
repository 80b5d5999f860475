"""Chats with images: each image gets its place in the turns, as processors' chat templates expect it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.chats import CHAT_FIELDS, Chat, chat_of_prompt, read_chat
from svdconvert.training.data.images import (
    PLACE,
    RowImage,
    image_of_part,
    images_of_fields,
    is_image_part,
)
from svdconvert.training.data.prompts import prompt_and_response
from svdconvert.training.data.rows import FieldSet, Row
from svdconvert.training.data.turn_contents import Turn

_NUMBER = "number"
_WITH_PARTS = ("system", "user", "assistant")


def read_image_chat(
    row: Row, fields: FieldSet, options: TrainOptions, folder: Path | None
) -> tuple[Chat, list[RowImage]]:
    """The chat of a row with images, and the images in the order of their places in it.

    An image's place is a part of a turn (`{"type": "image"}`, with or without the image itself) or `<image>`
    in a text; if a row marks no place, its images come before the first message of the user. Raises
    DataError if the places do not match the images, or an image cannot be used.
    """
    if fields == ("text",):
        raise DataError("it has images and a text without a prompt; give a prompt and a response, or a chat")
    if options.template not in (None, "chat"):
        raise DataError(
            "it has images, and such rows are rendered by the processor's chat template; leave template out"
        )
    images = images_of_fields(row, folder)
    if fields[0] in CHAT_FIELDS:
        chat = read_chat(row, fields[0], lambda turns: _with_places(turns, images, folder))
    else:
        prompt, response = prompt_and_response(row, fields, options)
        chat = chat_of_prompt(prompt, response, row)
        chat = replace(chat, turns=_with_places(chat.turns, images, folder))
    return _numbered_images(chat, images)


def _with_places(turns: Sequence[Turn], images: list[RowImage], folder: Path | None) -> list[Turn]:
    """The turns with lists of parts as their contents; the parts of images have the images' numbers.

    Images that the parts hold themselves are appended to `images`.
    """
    in_fields = len(images)
    placed = [_as_parts(turn, has_marks=in_fields > 0) for turn in turns]
    parts = [part for turn in placed for part in _parts(turn) if is_image_part(part)]
    waiting = list(range(in_fields))
    for part in parts:
        image = image_of_part(part, folder)
        if image is not None:
            part[_NUMBER] = len(images)
            images.append(image)
        elif waiting:
            part[_NUMBER] = waiting.pop(0)
        else:
            raise DataError(f"it has {in_fields} images, and more places for images in its text")
    if waiting and len(waiting) < in_fields:
        raise DataError(f"it has {in_fields} images, and only {in_fields - len(waiting)} places for them")
    if waiting:
        _place_before_first_text(placed, waiting)
    return placed


def _place_before_first_text(turns: list[Turn], numbers: Sequence[int]) -> None:
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if first is None:
        raise DataError("it has images and no message of the user that they could belong to")
    first["content"] = [*({"type": "image", _NUMBER: number} for number in numbers), *_parts(first)]


def _as_parts(turn: Turn, *, has_marks: bool) -> Turn:
    """A copy of a turn, with its text as a list of parts; with `has_marks`, `<image>` is a place."""
    content = turn.get("content")
    if isinstance(content, list):
        return {**turn, "content": [dict(part) if isinstance(part, Mapping) else part for part in content]}
    if not isinstance(content, str) or turn["role"] not in _WITH_PARTS:
        return dict(turn)
    texts = content.split(PLACE) if has_marks else [content]
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        if index:
            parts.append({"type": "image"})
        if text.strip() or len(texts) == 1:
            # The line break between the mark and the text belongs to the mark: templates write their own.
            parts.append({"type": "text", "text": text.strip("\n") if len(texts) > 1 else text})
    return {**turn, "content": parts}


def _parts(turn: Turn) -> list[Any]:
    content = turn.get("content")
    return content if isinstance(content, list) else []


def _numbered_images(chat: Chat, images: Sequence[RowImage]) -> tuple[Chat, list[RowImage]]:
    """The chat with plain parts, and those images that are in it, in order: the chat may have been cut."""
    used: list[RowImage] = []
    turns: list[Turn] = []
    for turn in chat.turns:
        content = turn.get("content")
        if isinstance(content, list):
            for part in content:
                if is_image_part(part):
                    used.append(images[part[_NUMBER]])
            content = [{"type": "image"} if is_image_part(part) else part for part in content]
        turns.append({**turn, "content": content} if content is not None else turn)
    return replace(chat, turns=turns), used
