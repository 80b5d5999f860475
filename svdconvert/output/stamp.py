"""A checksum at the end of a text that svdconvert writes, by which an edited one is recognised."""

import re

import xxhash

_STAMP = re.compile(r"\n<!-- written by svdconvert ([0-9a-f]{16}) -->\n$")


def stamped(text: str) -> str:
    """The text with a checksum of itself at its end, as a comment of HTML and Markdown."""
    return f"{text}\n<!-- written by svdconvert {xxhash.xxh3_64_hexdigest(text.encode())} -->\n"


def is_stamped(text: str) -> bool:
    """True for a text of `stamped` that nobody has edited."""
    found = _STAMP.search(text)
    return found is not None and stamped(text[: found.start()]) == text
