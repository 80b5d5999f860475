"""Images of rows: which values are images, and which are refused in a sentence that names them."""

import base64
import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from svdconvert.errors import DataError, MissingPackageError
from svdconvert.training.data import images
from svdconvert.training.data.images import find_image, image_of_part, images_of_fields, require_pillow

RED = (255, 0, 0)


def encoded(kind: str = "PNG", size: tuple[int, int] = (6, 4), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, RED).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "red.png").write_bytes(encoded())
    (tmp_path / "outside.png").write_bytes(encoded())
    return tmp_path / "data"


def spellings(folder: Path) -> dict[str, Any]:
    content = encoded()
    text = base64.b64encode(content).decode()
    return {
        "a relative path": "deep/red.png",
        "a path with dots": "deep/../deep/red.png",
        "an absolute path": str(folder / "deep" / "red.png"),
        "a file: address": f"file://{folder / 'deep' / 'red.png'}",
        "bytes": content,
        "what datasets writes": {"bytes": content, "path": None},
        "what datasets writes for a file": {"bytes": None, "path": "deep/red.png"},
        "an OpenAI object": {"url": f"data:image/png;base64,{text}"},
        "a data: address": f"data:image/png;base64,{text}",
    }


@pytest.mark.parametrize("kind", spellings(Path()))
def test_every_spelling_of_an_image_is_the_same_image(kind: str, folder: Path) -> None:
    found = find_image(spellings(folder)[kind], folder)
    assert found.open().size == (6, 4) and found.open().getpixel((0, 0)) == RED
    assert found.checksum == find_image("deep/red.png", folder).checksum
    assert (found.content is None) == (found.path is not None)


@pytest.mark.parametrize("key", ["image", "url", "path", "image_url"])
def test_a_part_of_a_turn_may_hold_its_image(key: str, folder: Path) -> None:
    found = image_of_part({"type": "image", key: "deep/red.png"}, folder)
    assert found is not None and found.name == "deep/red.png"
    assert image_of_part({"type": "image"}, folder) is None
    part = {"type": "image", "base64": base64.b64encode(encoded()).decode()}
    assert image_of_part(part, folder) is not None


def test_one_image_or_a_list_of_them(folder: Path) -> None:
    assert len(images_of_fields({"image": "deep/red.png"}, folder)) == 1
    assert len(images_of_fields({"images": ["deep/red.png", encoded()], "image": None}, folder)) == 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_usual_formats_are_read(kind: str) -> None:
    assert find_image(encoded(kind), None).open().mode == "RGB"


def test_an_image_is_turned_as_its_camera_says() -> None:
    upright = Image.Exif()
    upright[0x0112] = 6  # orientation: turned by 90 degrees
    assert find_image(encoded("JPEG", exif=upright), None).open().size == (4, 6)


def refused_values(folder: Path) -> dict[str, tuple[Any, str]]:
    cut = encoded(size=(64, 64))[:100]
    return {
        "no such file": ("deep/blue.png", r"'deep/blue.png' cannot be read: No such file"),
        "a directory": ("deep", "no regular file"),
        "not an image": (b"nothing", "cannot be read: it is no image of the formats PNG, JPEG"),
        "a picture in PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "no image of"),
        "a path with dots": ("../outside.png", "is outside .*data; move it there"),
        "an absolute path": (str(folder.parent / "outside.png"), "is outside"),
        "a zero byte": ("a\0b", "is outside"),
        "an address": ("https://example.com/a.png", "an address, and train downloads no images"),
        "a number": (3, "its image 3 is not an image"),
        "nothing": ({"bytes": None, "path": None}, "neither path nor bytes"),
        "no base64": ("data:image/png;base64,???", "not valid base64"),
        "text in bytes": ({"bytes": "abc"}, "not the bytes of a file"),
        "a truncated image": (cut, "cannot be read"),
    }


@pytest.mark.parametrize("kind", refused_values(Path("/")))
def test_what_is_no_image_is_refused_by_name(kind: str, folder: Path) -> None:
    value, complaint = refused_values(folder)[kind]
    with pytest.raises(DataError, match=complaint):
        find_image(value, folder).open()


def test_a_link_that_leaves_the_folder_is_refused(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(DataError, match="is outside"):
        find_image("link.png", folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_a_named_pipe_is_refused_without_waiting(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DataError, match="no regular file"):
        find_image("pipe.png", folder)


def test_a_path_in_rows_of_the_hub_needs_a_folder() -> None:
    with pytest.raises(DataError, match="rows are from the Hub.*image_dir"):
        find_image("a.png", None)


def huge(width: int, height: int) -> bytes:
    """A bitmap whose header claims a size; there are no pixels in it."""
    head = bytearray(encoded("BMP", size=(1, 1)))
    head[18:22] = width.to_bytes(4, "little")
    head[22:26] = height.to_bytes(4, "little")
    return bytes(head)


@pytest.mark.parametrize(("width", "height"), [(20_000, 5001), (30_000, 30_000)])
def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with pytest.raises(DataError, match=r"pixels; the most are 100,000,000: make it smaller"):
        find_image(huge(width, height), None)


def test_a_file_with_too_many_bytes_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_MOST_BYTES", 20)
    for value in ("deep/red.png", encoded()):
        with pytest.raises(DataError, match=r"bytes"):
            find_image(value, folder)


def test_an_image_that_changes_during_the_training_is_refused(folder: Path) -> None:
    found = find_image("deep/red.png", folder)
    (folder / "deep" / "red.png").write_bytes(encoded(size=(8, 8)))
    with pytest.raises(DataError, match=r"deep/red.png has changed since the training began"):
        found.open()


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"need Pillow: pip install .svdconvert\[vision\]"):
        require_pillow()
