"""Sizes in bytes as people write them: 5GB (10^9 bytes each), 200MB, 4GiB (2^30)."""

import re
from typing import Annotated

from pydantic import AfterValidator, ByteSize, TypeAdapter, ValidationError

_LONGEST = 40  # characters
# pydantic's ByteSize ignores what follows the first unit: it takes 5,5GB for 5 bytes.
_NUMBER_AND_UNIT = re.compile(r"\s*\d*\.?\d+\s*[A-Za-z]*\s*")


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB", "200MB" or "4GiB". Raises ValueError for anything else."""
    is_size = len(text) <= _LONGEST and _NUMBER_AND_UNIT.fullmatch(text)
    try:
        size = TypeAdapter(ByteSize).validate_python(text) if is_size else 0
    except ValidationError:
        size = 0
    if size < 1:
        raise ValueError("it should be a size above zero, such as 5GB, 200MB or 4GiB")
    return int(size)


def _checked(text: str) -> str:
    parse_size(text)
    return text


SizeText = Annotated[str, AfterValidator(_checked)]
"""The type of an option that is a size; its value stays the text that was typed, as manifests record it."""


def size_text(count: int) -> str:
    """1234567 -> "1.2 MB"."""
    return ByteSize(count).human_readable(decimal=True, separator=" ")
