"""Text from files is safe to print, and a closed or full standard output is one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svdconvert.cli.terminal import plain
from tests.conftest import Build
from tests.program import succeeded

PROGRAM = [sys.executable, "-m", "svdconvert"]


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("bell\x07", "bell\\x07"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("right\u202eto left", "right\\u202eto left"),
        ("half \ud800", "half \\ud800"),
        ("[bold]markup[/bold] Größe 模型", "[bold]markup[/bold] Größe 模型"),
    ],
)
def test_control_characters_become_visible_and_all_else_stays(foreign: str, shown: str) -> None:
    assert plain(foreign) == shown


@pytest.mark.parametrize("name", ["out[/i]", "out[red]", "line\nbreak", "bell\x07", "\x1b[31m"])
def test_a_name_with_markup_or_control_characters_is_shown_as_it_is(
    name: str, checkpoint: Build, tmp_path: Path
) -> None:
    out = tmp_path / name
    ended = succeeded("decompose", checkpoint("llama"), "-o", out, "--rank", 2)
    assert plain(out) in ended.out.replace("\n", "")
    assert "\x1b" not in ended.out and "\x07" not in ended.out
    assert plain(name) in succeeded("inspect", out).out.replace("\n", "")


@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", [["list", "methods"], ["list", "methods", "--json"], ["--version"]])
def test_a_full_standard_output_is_one_sentence(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "standard output cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.processes
def test_a_closed_standard_output_is_no_traceback(checkpoint: Build, tmp_path: Path) -> None:
    command = f"{sys.executable} -m svdconvert inspect {checkpoint('llama')} --json >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


@pytest.mark.processes
def test_a_terminal_without_the_letter_gets_an_escape(checkpoint: Build, tmp_path: Path) -> None:
    model = tmp_path / "größe"
    model.symlink_to(checkpoint("llama"))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    words = [*PROGRAM, "inspect", str(model)]
    done = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_json_is_one_document(checkpoint: Build) -> None:
    assert json.loads(succeeded("inspect", checkpoint("llama"), "--json").out)["kind"] == "checkpoint"
