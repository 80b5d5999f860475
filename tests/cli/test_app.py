"""The command line: help, version, listings, plans, and which value wins if an option is given twice."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_group

from svdconvert.cli.app import app
from svdconvert.commands.list_plugins import in_words, list_plugins
from svdconvert.layouts.base import LAYOUTS
from svdconvert.manifest.schema import read_manifest
from svdconvert.methods.base import METHODS
from svdconvert.quantization.base import FORMATS
from tests.conftest import Build
from tests.program import content, refused, succeeded, svdconvert

COMMANDS = sorted(get_group(app).commands)


def test_the_commands_are_those_that_the_documents_name() -> None:
    known = {"decompose", "train", "merge", "to-lora", "convert", "push", "verify", "inspect", "list"}
    assert known <= {*COMMANDS}


@pytest.mark.processes
def test_help_loads_no_torch_and_every_command_has_an_example() -> None:
    """All commands in one process, and what each of them has imported by then."""
    program = (
        "import json, sys; from typer.testing import CliRunner; from svdconvert.cli.app import app\n"
        "for command in sys.argv[1:]:\n"
        "    shown = CliRunner().invoke(app, [command, '--help']).output\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub'} & {*sys.modules}\n"
        "    print(json.dumps([command, '\\nExample' in shown, sorted(heavy)]))\n"
    )
    words = [sys.executable, "-c", program, *COMMANDS]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [command, True, []] for command in COMMANDS
    ]


@pytest.mark.processes
def test_the_module_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "svdconvert", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"svdconvert {version('svdconvert')}\n", "")


def test_without_a_command_it_shows_all_of_them() -> None:
    ended = svdconvert()
    assert ended.status == 0
    assert all(command in ended.out + ended.err for command in COMMANDS)


def test_list_as_json_has_a_row_for_each() -> None:
    methods = json.loads(succeeded("list", "methods", "--json").out)
    assert [row["method"] for row in methods] == METHODS.names()
    layouts = json.loads(succeeded("list", "layouts", "--json").out)
    assert [row["layout"] for row in layouts] == [*LAYOUTS.names(), "auto", "names"]
    formats = json.loads(succeeded("list", "formats", "--json").out)
    assert [row["format"] for row in formats] == FORMATS.names()


@pytest.mark.parametrize("what", ["methods", "layouts", "formats", "tasks", "recipes", "merges"])
def test_list_is_readable_in_80_columns(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = list_plugins(what)  # type: ignore[arg-type]
    lines = succeeded("list", what).out.splitlines()
    assert lines.pop() == f"next  svdconvert list {what} NAME"
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [*map(name_of, rows)]
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    sentences = " ".join(
        f"{value} (group {' '.join(row.get('groups', ()))})" for row in rows for value in row.values()
    )
    assert {word for word in words if word.rstrip(".,") not in sentences} == set(), "a word is cut"


def name_of(row: Mapping[str, Any]) -> str:
    return str(next(iter(row.values())))


@pytest.mark.parametrize(("what", "name"), [("methods", "pissa"), ("tasks", "gsm8k"), ("merges", "ties")])
def test_list_shows_all_of_one(what: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = succeeded("list", what, name).out
    (row,) = list_plugins(what, name)
    for label, text in in_words(row).items():
        assert text in ("", "-") or f"{label} {text}" in " ".join(out.split())
    assert json.loads(succeeded("list", what, name, "--json").out) == [row]
    refused("list", what, f"{name}x", words=[f"did you mean {name}?"])


@pytest.mark.processes
@pytest.mark.parametrize("what", ["layouts", "tasks", "recipes"])
def test_a_list_without_arithmetic_imports_no_torch(what: str) -> None:
    code = f"import sys; from svdconvert.commands.list_plugins import list_plugins; list_plugins({what!r}); "
    done = subprocess.run([sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True)
    assert done.stdout.strip() == b"False", done.stderr


def test_a_plan_writes_nothing_and_names_the_right_sizes(checkpoint: Build, tmp_path: Path) -> None:
    model = checkpoint("llama")
    out = tmp_path / "out"
    command = ("decompose", model, "-o", out, "--rank", 4)
    shown = succeeded(*command, "--plan").out
    assert list(tmp_path.iterdir()) == []
    assert re.search(r"attn\.k +16 x 32 +4 +2 +384", shown)
    succeeded(*command)
    files = list(out.rglob("*.safetensors"))
    # The plan does not count the headers, so the sizes are compared without them.
    payload = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert f"{payload / 1000:.1f} KB in {len(files)} files" in shown


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(
    checkpoint: Build, tmp_path: Path
) -> None:
    model = checkpoint("llama")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\nseed: 5\nthreads: 1\n"
        "decompose: {rank: 3, targets: [attn.q, mlp.down], max-shard-size: 20KB}\n"
        "merge: {from: residual, dtype: float32}\n"
    )
    succeeded("decompose", "--recipe", recipe, "-o", tmp_path / "one")
    one = read_manifest(tmp_path / "one").options
    assert (one["rank"], one["seed"], one["targets"], one["tol"]) == (3, 5, ["attn.q", "mlp.down"], 1e-3)
    assert (tmp_path / "one" / "model.safetensors.index.json").exists()
    typed = ("--rank", 2, "--seed", 6, "--targets", "attn.k")
    succeeded("decompose", model, "--recipe", recipe, "-o", tmp_path / "two", *typed)
    two = read_manifest(tmp_path / "two").options
    assert (two["rank"], two["seed"], two["targets"], two["max_shard_size"]) == (2, 6, ["attn.k"], "20KB")
    succeeded("merge", tmp_path / "one", "--recipe", recipe, "-o", tmp_path / "merged", "--dtype", "bfloat16")
    merged = read_manifest(tmp_path / "merged").options
    assert (merged["side"], merged["dtype"]) == ("residual", "bfloat16")


def test_a_command_ends_with_the_next_command(checkpoint: Build, tmp_path: Path) -> None:
    shown = succeeded("decompose", checkpoint("llama"), "-o", tmp_path / "out", "--rank", 4)
    assert f"svdconvert train {tmp_path / 'out'} -o TRAINED --data FILE" in shown.out
    assert "rank 4, 14 matrices" in shown.out
    assert shown.err == ""


def test_overwrite_replaces_what_svdconvert_wrote(checkpoint: Build, tmp_path: Path) -> None:
    command = ("decompose", checkpoint("llama"), "-o", tmp_path / "out", "--rank")
    succeeded(*command, 4)
    succeeded(*command, 3, "--overwrite")
    succeeded("decompose", checkpoint("llama"), "-o", tmp_path / "anew", "--rank", 3)
    assert content(tmp_path / "out") == content(tmp_path / "anew")


def test_ctrl_c_ends_with_status_130(
    checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("svdconvert.pipeline.decompose.stream", interrupt)
    ended = svdconvert("decompose", checkpoint("llama"), "-o", tmp_path / "out", "--rank", 4)
    assert (ended.status, ended.err.startswith("svdconvert: interrupted")) == (130, True)
    assert "the same command" in ended.err


def test_the_console_script_can_be_loaded() -> None:
    (program,) = [point for point in entry_points(group="console_scripts") if point.name == "svdconvert"]
    assert callable(program.load())
