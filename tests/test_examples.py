"""The notebook runs, shows what it says, and uses public names; the README shows what the commands print."""

import ast
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

import svdconvert
from tests.conftest import Build
from tests.program import succeeded
from tests.reading import readable, write_sums

ROOT = Path(__file__).resolve().parents[1]
RECORD = runpy.run_path(str(ROOT / "examples" / "record.py"))
README = (ROOT / "README.md").read_text()


def cells() -> list[Any]:
    """The cells with code of the committed notebook."""
    notebook = nbformat.read(RECORD["NOTEBOOK"], as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shapes(found: list[Any]) -> list[list[object]]:
    """For every cell, its outputs: lines printed, with # for numbers, or the types of what is shown."""
    return [
        [
            re.sub(r"[-+]?[\d.]+%?", "#", output.text) if "text" in output else sorted(output.data)
            for output in cell.outputs
            if output.get("name") != "stderr"
        ]
        for cell in found
    ]


def test_the_notebook_shows_every_step_and_a_picture() -> None:
    calls = {
        node.func.id
        for cell in cells()
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert {"decompose", "train", "to_lora", "merge", "inspect", "diff"} <= calls
    assert ["image/svg+xml", "text/plain"] in [shape for cell in shapes(cells()) for shape in cell]


def test_the_notebook_imports_names_that_exist_and_public_ones_of_the_package() -> None:
    imported = [
        (str(node.module), name.name)
        for cell in cells()
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    ]
    public = {name for module, name in imported if module == "svdconvert"}
    assert public <= {*svdconvert.__all__}
    assert len(public) > 5
    for module, name in imported:
        if module.startswith("svdconvert."):
            assert hasattr(import_module(module), name), f"{module}.{name}"


def test_the_notebook_was_committed_after_a_complete_run() -> None:
    assert [cell.execution_count for cell in cells()] == [*range(1, len(cells()) + 1)]
    text = str(shapes(cells()))
    assert "error" not in text
    assert not re.search(r"/(home|tmp|root|Users)/", str([cell.outputs for cell in cells()]))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.processes
@pytest.mark.sweep
def test_the_notebook_runs_and_shows_what_was_committed(smollm2: Path) -> None:
    notebook = RECORD["executed"](smollm2)
    assert shapes([cell for cell in notebook.cells if cell.cell_type == "code"]) == shapes(cells())


@pytest.mark.slow
def test_the_readme_shows_what_the_commands_print(
    checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny model: the numbers are other ones, and so is what is said of them on standard error."""
    monkeypatch.chdir(tmp_path)
    readable(checkpoint("llama", dtype=torch.float32), tmp_path / "smollm2")
    write_sums(tmp_path / "train.jsonl", rows=40)
    commands = RECORD["commands_of"](README)
    assert [command.split()[1] for command in commands] == ["decompose", "train", "to-lora", "merge"]
    shown = RECORD["CHAIN"].search(README)[2]
    for command in commands:
        smaller = re.sub(r"--(rank|steps) \d+", lambda found: f"--{found[1]} {SMALL[found[1]]}", command)
        short = ["--max-length", "48"] if "train" in command.split() else []
        said = succeeded(*shlex.split(smaller)[1:], *short).out
        after = re.split(r"^\$ .*\n", shown.split(f"$ {command}\n")[1], flags=re.MULTILINE)[0]
        assert labels(said) <= labels(after), command


SMALL = {"rank": 4, "steps": 2}


def labels(text: str) -> set[str]:
    """The first column of a summary, without continued lines, and the lines that name what comes next."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    found = {line if line.startswith(("next", "  or")) else re.split(r"\s{2,}", line)[0] for line in lines}
    return found - {""}
