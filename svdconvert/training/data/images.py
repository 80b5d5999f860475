"""The images of a row of training data: found, checked and opened with Pillow when they are needed."""

import base64
import binascii
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, simplefilter

from xxhash import xxh3_64

from svdconvert.checkpoint.regular_file import open_regular
from svdconvert.errors import CheckpointError, DataError, MissingPackageError, brief
from svdconvert.training.data.rows import Row

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_FIELDS = ("images", "image")
"""Fields of a row that hold its images: a list, or a single one."""
PLACE = "<image>"
"""Marks the place of an image in a text."""
MOST_PIXELS = 100_000_000
"""A larger image is refused: decoded it takes 300 MB, and no processor keeps that many pixels."""
_MOST_BYTES = 1 << 28
# Not every format that Pillow knows: some of them start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_SOURCES = ("image", "image_url", "url", "path", "base64", "bytes")


@dataclass(frozen=True, slots=True)
class RowImage:
    """One image of a row, still encoded. Only an image that is in the row itself is kept in memory."""

    name: str
    """For messages: its path as the row gives it, or what it is."""
    path: Path | None
    content: bytes | None
    checksum: str
    """Of the encoded bytes."""

    def open(self) -> "Image":
        """The decoded image, upright and in RGB. Raises DataError if it cannot be read or has changed."""
        content = self.content if self.path is None else _read_file(self.path, self.name)
        assert content is not None
        if xxh3_64(content).hexdigest() != self.checksum:
            raise DataError(f"the image {self.name} has changed since the training began; restore the file")
        return _decode(content, self.name)


def require_pillow() -> None:
    """Raise MissingPackageError if Pillow, which decodes images, is not installed."""
    if find_spec("PIL") is None:
        raise MissingPackageError('rows with images need Pillow: pip install "svdconvert[vision]"')


def has_images(row: Row, field: str) -> bool:
    """True if a row has images, in a field of its own or in the turns of the chat in `field`."""
    if any(row.get(name) not in (None, [], {}, "") for name in IMAGE_FIELDS):
        return True
    turns = row.get(field)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        return False
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(is_image_part(part) for part in parts)


def is_image_part(part: Any) -> bool:
    """True for the part of a turn's content that stands for an image."""
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def images_of_fields(row: Row, folder: Path | None) -> list[RowImage]:
    """The images in the fields of a row. Raises DataError if one of them cannot be found."""
    found: list[RowImage] = []
    for field in IMAGE_FIELDS:
        value = row.get(field)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        found += [find_image(one, folder) for one in values if one is not None]
    return found


def image_of_part(part: Mapping[str, Any], folder: Path | None) -> RowImage | None:
    """The image that a part of a turn names itself; None if it only marks a place."""
    for key in _SOURCES:
        value = part.get(key)
        if value in (None, "", {}):
            continue
        if key == "base64" and isinstance(value, str):
            return _image_in_row(_from_base64(value), "an image in base64")
        return find_image(value, folder)
    return None


def find_image(value: Any, folder: Path | None) -> RowImage:
    """The image that a value of a row stands for.

    That is a path below `folder`, the bytes of a file, a data: address with them, or an object with `bytes`
    or `path` as `datasets` writes it, or with `url`. Raises DataError if it is none of these.
    """
    if isinstance(value, Mapping):
        return _image_of_object(value, folder)
    if isinstance(value, bytes):
        return _image_in_row(value, "an image in the row")
    if not isinstance(value, str):
        raise DataError(
            f"its image {brief(value)} is not an image: give a path, the bytes of a file, or an object with "
            "path or bytes"
        )
    if value.startswith("data:"):
        return _image_in_row(_from_base64(value.partition(",")[2]), "an image in a data: address")
    if "://" in value and not value.startswith("file://"):
        raise DataError(
            f"its image {brief(value)} is an address, and train downloads no images; save the file and give "
            "its path"
        )
    return _image_at(value.removeprefix("file://"), folder)


def _image_of_object(value: Mapping[str, Any], folder: Path | None) -> RowImage:
    content = value.get("bytes")
    if content is not None:
        if not isinstance(content, bytes):
            raise DataError(f"the bytes of its image are {brief(content)}, not the bytes of a file")
        path = value.get("path")
        return _image_in_row(content, path if isinstance(path, str) else "an image in the row")
    for key in ("path", "url"):
        if isinstance(value.get(key), str):
            return find_image(value[key], folder)
    raise DataError(f"its image {brief(dict(value))} has neither path nor bytes")


def _image_at(name: str, folder: Path | None) -> RowImage:
    if folder is None:
        raise DataError(
            f"its image {brief(name)} is a path, and the rows are from the Hub; give the folder of the "
            "images with `image_dir`"
        )
    path = folder / name
    if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"its image {brief(name)} is outside {folder}; move it there, or give the folder of the images "
            "with `image_dir`"
        )
    content = _read_file(path, name)
    _decode_size(content, name)
    return RowImage(name, path, None, xxh3_64(content).hexdigest())


def _image_in_row(content: bytes, name: str) -> RowImage:
    if len(content) > _MOST_BYTES:
        raise DataError(f"{name} has {len(content):,} bytes; the most are {_MOST_BYTES:,}: make it smaller")
    _decode_size(content, name)
    return RowImage(name, None, content, xxh3_64(content).hexdigest())


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError("its image is not valid base64") from error


def _read_file(path: Path, name: str) -> bytes:
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise DataError(f"its image {brief(name)} cannot be read: {error.strerror} ({path})") from error
    except CheckpointError as error:
        raise DataError(f"its image {brief(name)} cannot be read: {error}") from error
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise DataError(
            f"its image {brief(name)} has more than {_MOST_BYTES:,} bytes; make it smaller ({path})"
        )
    return content


def _decode_size(content: bytes, name: str) -> None:
    """Raise DataError if this is no image, or too large a one; only its header is read."""
    with _opened(content, name):
        pass


def _decode(content: bytes, name: str) -> "Image":
    from PIL import ImageOps

    with _opened(content, name) as image:
        try:
            upright: Image = ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise _unreadable(name, error) from error
    return upright


@contextmanager
def _opened(content: bytes, name: str) -> "Iterator[Image]":
    """The image, of which only the header is read. Raises DataError if it is none, or has too many pixels."""
    require_pillow()
    from PIL import Image

    try:
        with catch_warnings():
            simplefilter("ignore")  # Pillow warns of many pixels, which are refused below
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(name, "too many")) from error
    except Exception as error:
        raise _unreadable(name, error) from error
    with image:
        if image.width * image.height > MOST_PIXELS:
            raise DataError(_too_large(name, f"{image.width} x {image.height}"))
        yield image


def _too_large(name: str, size: str) -> str:
    return f"its image {brief(name)} has {size} pixels; the most are {MOST_PIXELS:,}: make it smaller"


def _unreadable(name: str, error: Exception) -> DataError:
    formats = ", ".join(_FORMATS)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if type(error).__name__ == "UnidentifiedImageError":
        reason = f"it is no image of the formats {formats}"
    return DataError(f"its image {brief(name)} cannot be read: {reason}; replace the file")
