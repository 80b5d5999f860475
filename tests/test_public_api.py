"""The names and parameters that `import svdconvert` offers: programs rely on them."""

import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import svdconvert
from tests.conftest import Build

NAMES = [
    "ChatOptions",
    "CombineOptions",
    "ConvertOptions",
    "EvaluationOptions",
    "EvaluationResult",
    "ExtractOptions",
    "LoraOptions",
    "Manifest",
    "MergeOptions",
    "Progress",
    "PushOptions",
    "Run",
    "SplitOptions",
    "SvdConvertError",
    "TrainOptions",
    "TrainPlan",
    "chat",
    "combine",
    "convert",
    "decompose",
    "diff",
    "doctor",
    "evaluate",
    "extract",
    "inspect",
    "list_plugins",
    "merge",
    "push",
    "read_evaluations",
    "read_manifest",
    "report",
    "run",
    "to_lora",
    "train",
    "verify",
    "verify_merge",
]
ALIASES = {"TrainPlan": "TrainOptions"}
PARAMETERS = {
    "combine": ["inputs", "out", "options", "run", "*base", "*residual", "*init", "*config"],
    "convert": ["model", "out", "options", "run"],
    "decompose": ["model", "out", "options", "run"],
    "train": ["model", "out", "plan", "run", "*split", "*base", "*watch"],
    "merge": ["adapter", "out", "options", "run", "*base", "*residual", "*init"],
    "to_lora": ["adapter", "out", "options", "run", "*base", "*residual", "*init"],
    "verify": ["directory", "run", "*base", "*nuclear_ratio"],
    "verify_merge": ["merged", "bases", "adapter", "run"],
    "extract": ["base", "tuned", "out", "options", "run"],
    "diff": ["first", "second", "run"],
    "inspect": ["model", "engine", "*trust_remote_code"],
    "list_plugins": ["what", "name"],
    "run": ["recipe", "out", "settings", "*changes", "*watch"],
    "push": ["directory", "repository", "options", "*base", "*residual", "*run"],
    "evaluate": [
        "directory",
        "tasks",
        "options",
        "run",
        "*data",
        "*limit",
        "*base",
        "*residual",
        "*output",
    ],
    "read_evaluations": ["directory"],
    "read_manifest": ["directory"],
    "report": ["directories", "out", "run"],
}


def test_the_exported_names_are_these() -> None:
    assert svdconvert.__all__ == NAMES
    for name in NAMES:
        exported = getattr(svdconvert, name)
        assert exported.__name__ == ALIASES.get(name, name)
        assert exported.__module__.startswith("svdconvert.")
        assert exported.__doc__


def test_the_version_is_that_of_the_installed_package() -> None:
    assert svdconvert.__version__ == version("svdconvert")


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_functions_take_these_parameters(name: str) -> None:
    parameters = inspect.signature(getattr(svdconvert, name)).parameters.values()
    found = ["*" * (entry.kind is entry.KEYWORD_ONLY) + entry.name for entry in parameters]
    assert found == PARAMETERS[name]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'decompse'"):
        svdconvert.decompse  # noqa: B018


@pytest.mark.processes
def test_importing_the_package_imports_neither_torch_nor_pydantic() -> None:
    program = "import sys, svdconvert; sys.exit(str({'torch', 'pydantic', 'typer'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"


def test_a_whole_chain_in_python(checkpoint: Build, tmp_path: Path) -> None:
    options = svdconvert.SplitOptions(method="pissa", rank=4, targets=("attn", "mlp.down"))
    made = svdconvert.decompose(
        checkpoint("llama"), tmp_path / "pissa", options, svdconvert.Run(device="cpu")
    )
    assert len(made.matrices) == 10
    for directory in (tmp_path / "pissa", str(tmp_path / "pissa")):
        assert svdconvert.read_manifest(directory).matrices == made.matrices
        assert svdconvert.read_evaluations(directory) == []
    assert svdconvert.verify(tmp_path / "pissa").passed
    assert svdconvert.merge(tmp_path / "pissa", tmp_path / "merged").kind == "merged"
    assert svdconvert.to_lora(tmp_path / "pissa", tmp_path / "lora").kind == "lora"
    assert svdconvert.inspect(tmp_path / "lora").kind == "lora"
    with pytest.raises(svdconvert.SvdConvertError):
        svdconvert.verify(tmp_path)
