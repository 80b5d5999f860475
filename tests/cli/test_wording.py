"""Options in sentences: Python's names in backquotes for callers, spelled options on the command line."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from svdconvert import SplitOptions, TrainOptions
from svdconvert.cli.wording import as_typed
from svdconvert.config.recipe import Recipe, options
from svdconvert.errors import RecipeError
from tests.program import refused, svdconvert


def test_an_option_in_backquotes_is_spelled_as_it_is_typed() -> None:
    assert as_typed("`eval_rows` or `eval_data`, not `side`") == "--eval-rows or --eval-data, not --from"
    assert as_typed("`model.layers` and `nothing` and eval_rows stay") == (
        "`model.layers` and `nothing` and eval_rows stay"
    )
    for kind in (SplitOptions, TrainOptions):
        for entry in fields(kind):
            assert as_typed(f"`{entry.name}`").startswith("--")


def test_python_and_the_command_line_read_the_same_sentence_with_their_own_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`steps` and `epochs` exclude each other"):
        options(TrainOptions, Recipe(), {"steps": 1, "epochs": 1})
    words = ("train", tmp_path, "-o", tmp_path / "out", "--steps", 1, "--epochs", 1)
    refused(*words, words=["--steps and --epochs exclude each other"])


def test_a_missing_option_is_wrong_usage_and_named(tmp_path: Path) -> None:
    ended = svdconvert("convert", tmp_path, "-o", tmp_path / "out")
    assert (ended.status, ended.out) == (2, "")
    assert "--layout is missing" in ended.err


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (("list", "method"), "did you mean methods?"),
        (("merge", "x", "-o", "y", "--dtype", "fp16"), "did you mean float16?"),
        (("train", "x", "-o", "y", "--precision", "bf-16"), "did you mean bf16?"),
    ],
)
def test_a_wrong_choice_is_answered_with_the_nearest(words: tuple[str, ...], nearest: str) -> None:
    ended = svdconvert(*words)
    assert ended.status == 2
    assert nearest in " ".join(ended.err.split())
    assert "Value error" not in ended.err
    assert ended.err.startswith(f"Usage: svdconvert {words[0]} ") or "Usage:" in ended.err


@pytest.mark.processes
def test_completion_knows_commands_and_options_without_torch() -> None:
    program = (
        "import json, sys, io, contextlib; from svdconvert.cli.app import app\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit): app(prog_name='svdconvert')\n"
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub'} & {*sys.modules}\n"
        "print(json.dumps([out.getvalue().split(), sorted(heavy)]))\n"
    )
    found = {}
    for line in ("svdconvert ", "svdconvert train --eval-"):
        environment = {
            **os.environ,
            "_SVDCONVERT_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        found[line], heavy = json.loads(done.stdout)
        assert heavy == []
    assert {"decompose", "train", "to-lora"} <= {*found["svdconvert "]}
    assert {"--eval-rows", "--eval-data", "--eval-every"} <= {*found["svdconvert train --eval-"]}


@pytest.mark.parametrize("words", [["list", "method"], ["merge", "x", "--dtype", "fp17"], ["frobnicate"]])
def test_a_usage_error_is_broken_between_words(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = svdconvert(*words).err
    terminal = Console(file=StringIO(), width=60, force_terminal=True)
    monkeypatch.setattr("svdconvert.cli.options.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    shown = svdconvert(*words).err
    assert max(map(len, shown.splitlines())) <= 60
    assert shown.split() == whole.split()
