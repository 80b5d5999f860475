"""The results of evaluations in a directory stay when another command replaces the directory."""

import shutil
from pathlib import Path

import pytest

from svdconvert import Run, SplitOptions, decompose
from svdconvert.output import ownership
from svdconvert.output.ownership import check_free, foreign_files
from tests.conftest import Build

RESULT = {"gsm8k.json": "{}", "gsm8k.jsonl": "", "notes.txt": "mine"}


def evaluated(directory: Path) -> Path:
    """The directory, with results in it."""
    folder = directory / "evaluations"
    folder.mkdir()
    for name, text in RESULT.items():
        (folder / name).write_text(text)
    return directory


def results(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (directory / "evaluations").iterdir()}


def decomposed(model: Path, out: Path) -> Path:
    decompose(model, out, SplitOptions(rank=2), Run(overwrite=True))
    return out


def test_overwrite_keeps_the_evaluations_of_the_directory_that_it_replaces(
    checkpoint: Build, tmp_path: Path
) -> None:
    out = evaluated(decomposed(checkpoint("llama"), tmp_path / "out"))
    assert list(foreign_files(out)) == []
    decomposed(checkpoint("llama"), out)
    assert results(out) == RESULT
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_called_evaluations_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluations").symlink_to(tmp_path)
    assert [str(path) for path in foreign_files(tmp_path / "out")] == ["evaluations"]
    with pytest.raises(ownership.OutputError, match="evaluations"):
        check_free(tmp_path / "out", overwrite=True)


def test_evaluations_that_a_killed_run_moved_aside_come_back_with_the_next_one(
    checkpoint: Build, tmp_path: Path
) -> None:
    """The kill came between the two renamings that replace the directory."""
    out = evaluated(decomposed(checkpoint("llama"), tmp_path / "out"))
    out.rename(tmp_path / ".out.replaced-1-0")
    decomposed(checkpoint("llama"), out)
    decomposed(checkpoint("llama"), out)
    assert results(out) == RESULT
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_evaluations_that_have_no_place_are_not_removed(checkpoint: Build, tmp_path: Path) -> None:
    out = evaluated(decomposed(checkpoint("llama"), tmp_path / "out"))
    aside = tmp_path / ".out.replaced-1-0"
    shutil.copytree(out, aside)
    (aside / "evaluations" / "gsm8k.json").write_text("another")
    decomposed(checkpoint("llama"), out)
    assert results(out) == RESULT
    assert results(aside) == {**RESULT, "gsm8k.json": "another"}
    assert [path.name for path in aside.iterdir()] == ["evaluations"], "the weights are removed"
