"""The benchmarks fit the library: they are not run, but everything that they import exists."""

import ast
import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).resolve().parents[1] / "benchmarks"
PROGRAMS = sorted(file.name for file in DIRECTORY.glob("*.py"))


def embedded_imports(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of what the programs import from svdconvert that a benchmark starts from a string."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and "from svdconvert" in str(node.value):
            for line in ast.walk(ast.parse(node.value)):
                if isinstance(line, ast.ImportFrom) and str(line.module).startswith("svdconvert"):
                    yield from ((str(line.module), alias.name) for alias in line.names)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_benchmark_can_be_imported_and_says_how_it_is_run(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DIRECTORY))
    names = runpy.run_path(str(DIRECTORY / program))
    assert "main" not in names or f"python benchmarks/{program}" in names["__doc__"]
    for module, name in embedded_imports(DIRECTORY / program):
        assert hasattr(importlib.import_module(module), name), f"{program} imports {module}.{name}"


def test_the_embedded_programs_are_found() -> None:
    assert ("svdconvert.linalg.delta", "as_lora") in embedded_imports(DIRECTORY / "streaming.py")


@pytest.fixture(autouse=True)
def _forget_the_modules_of_the_benchmarks() -> Iterator[None]:
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).parent == DIRECTORY:
            del sys.modules[name]
