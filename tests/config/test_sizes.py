"""Sizes as people write them."""

import pytest

from svdconvert.config.sizes import parse_size, size_text
from svdconvert.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5 * 10**9),
        ("200MB", 2 * 10**8),
        ("4GiB", 4 * 2**30),
        ("1.5 kb", 1500),
        (" 10 ", 10),
        ("3TiB", 3 * 2**40),
        ("7b", 7),
    ],
)
def test_units_are_decimal_or_binary_as_their_names_say(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "0GB", "5 G B", "5XB", "1e9", "5,5GB", "five"])
def test_anything_else_is_refused_showing_how(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a size; write it as 5GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1234567, "1.23 MB"),
        (10**9, "1.00 GB"),
        (5 * 10**12, "5.00 TB"),
        (10**16, "10000.00 TB"),
    ],
)
def test_sizes_are_printed_short(count: int, text: str) -> None:
    assert size_text(count) == text
