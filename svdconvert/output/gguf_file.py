"""A GGUF file, laid out before the values of its tensors are known.

Version 3, little-endian: counts, metadata, the table of tensors, then their bytes at multiples of 32. The
gguf library is not used for writing because it collects all tensors first. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping, Sequence
from struct import pack

from svdconvert.checkpoint.tensors import TensorInfo

ENDING = ".gguf"
MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "BF16": 30}
"""safetensors' code of an element type -> ggml's."""
FLOAT32 = 6
STRING = 8
"""Numbers of the types of metadata values."""

Value = str | float
Metadata = Sequence[tuple[str, Value]]
"""Text or float32 values by key, in the order of the file."""


def build_header(metadata: Metadata, infos: Sequence[TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and the offset of each tensor in the file."""
    parts = [MAGIC, pack("<IQQ", VERSION, len(infos), len(metadata))]
    for key, value in metadata:
        parts.append(_text(key))
        if isinstance(value, str):
            parts += [pack("<I", STRING), _text(value)]
        else:
            parts.append(pack("<If", FLOAT32, value))
    places = {}
    end = 0
    for info in infos:
        places[info.name] = end
        sides = info.shape[::-1]  # ggml names the side that is contiguous first
        parts += [_text(info.name), pack(f"<I{len(sides)}Q", len(sides), *sides)]
        parts.append(pack("<IQ", TYPES[info.dtype], end))
        end += _padded(info.nbytes)
    head = b"".join(parts)
    head += bytes(_padded(len(head)) - len(head))
    return head, {name: len(head) + place for name, place in places.items()}


def file_size(metadata: Metadata, infos: Sequence[TensorInfo]) -> int:
    """Bytes of the whole file; the space after each tensor is filled with zeros."""
    head, _ = build_header(metadata, infos)
    return len(head) + sum(_padded(info.nbytes) for info in infos)


def _text(text: str) -> bytes:
    data = text.encode()
    return pack("<Q", len(data)) + data


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
