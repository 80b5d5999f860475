"""Sizes as people write them."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from svdconvert.config.options import ConvertOptions, MergeOptions, SplitOptions
from svdconvert.config.recipe import options, read_recipe
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


NO_SIZES = ["", "GB", "-5GB", "0", "0GB", "0.5B", "5 G B", "5XB", "1e9", "5,5GB", "five", "5GB 1"]


@pytest.mark.parametrize("text", NO_SIZES)
def test_anything_else_is_refused_when_the_options_are_parsed(text: str, tmp_path: Path) -> None:
    for kind, other in ((SplitOptions, {}), (MergeOptions, {}), (ConvertOptions, {"layout": "hf"})):
        with pytest.raises(RecipeError, match="`max_shard_size` is .*: it should be a size"):
            options(kind, read_recipe(None), {"max_shard_size": text, **other})
    path = tmp_path / "recipe.yaml"
    path.write_text(f"decompose: {{max_shard_size: {json.dumps(text)}}}")
    with pytest.raises(
        RecipeError, match=r"recipe.yaml: decompose: max_shard_size is .*: it should be a size"
    ):
        options(SplitOptions, read_recipe(path), {})


@pytest.mark.parametrize("text", ["5GB", "1.5 kb", "4GiB"])
def test_an_option_keeps_the_text_that_was_typed(text: str) -> None:
    made = options(SplitOptions, read_recipe(None), {"max_shard_size": text})
    assert made.max_shard_size == text
    assert json.loads(TypeAdapter(SplitOptions).dump_json(made))["max_shard_size"] == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234567, "1.2 MB"), (10**9, "1.0 GB"), (5 * 10**12, "5.0 TB")],
)
def test_sizes_are_printed_short(count: int, text: str) -> None:
    assert size_text(count) == text
