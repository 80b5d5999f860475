"""YAML files of the user's: plain data in a small regular file, with every key once."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from svdconvert.config.mergekit_file import read_merge_file
from svdconvert.config.recipe import read_recipe
from svdconvert.errors import RecipeError

READERS: dict[str, Callable[[Path], object]] = {"--recipe": read_recipe, "--config": read_merge_file}
WORDS = dict.fromkeys(("a\0b", "absent", "x" * 300), "does not exist|cannot")
every_reader = pytest.mark.parametrize("option", READERS)


@every_reader
def test_what_is_no_small_regular_file_is_refused_at_once(option: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(40 << 30)
    (tmp_path / "pipe.yaml").symlink_to("pipe")
    for place in ("pipe", "pipe.yaml", "large", "/dev/zero", "/dev/stdin", ".", "absent", "a\0b", "x" * 300):
        with pytest.raises(RecipeError, match=WORDS.get(place, option.replace("-", r"\-"))):
            READERS[option](tmp_path / place)


@every_reader
@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("seed: 1\nmerge_method: a\nseed: 2\n", "line 3: 'seed'"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: 'steps'"),
        ("models:\n- {model: a, model: b}\n", "line 2: 'model'"),
        ("a: &x {b: {c: 1, 'c': 2}}\nd: *x\n", "line 1: 'c'"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(option: str, text: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(RecipeError, match=f"{where} is there twice"):
        READERS[option](tmp_path / "file.yaml")


def test_the_same_key_in_two_mappings_and_a_merged_one_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train: &usual {seed: 1, lr: 0.5}\ndecompose: {seed: 2}\nmerge: {<<: {dtype: float32}}\n")
    recipe = read_recipe(path)
    assert recipe.sections["train"]["lr"] == 0.5
    assert recipe.sections["merge"] == {"dtype": "float32"}
