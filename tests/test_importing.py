"""Importing torch for arithmetic alone: the same bytes, and nothing lost for those who ask."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from svdconvert.artifact.options import SplitOptions
from svdconvert.importing import _PARTS, _TRIED
from svdconvert.method import METHODS
from svdconvert.run import Run
from svdconvert.verbs.decompose import decompose
from svdconvert.verbs.merge import merge
from svdconvert.verbs.to_lora import to_lora
from tests import medium
from tests.rwkv6 import random_model, save

TRIED = torch.__version__ in _TRIED
BEGIN = """
import sys
from svdconvert.importing import import_for_arithmetic, whole_torch
"""


def said(program: str, *arguments: object, before: str = "") -> str:
    """What a fresh interpreter prints."""
    words = [sys.executable, "-c", BEGIN + textwrap.dedent(before) + textwrap.dedent(program)]
    done = subprocess.run([*words, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_build_that_the_makefile_installs_was_tried() -> None:
    pinned = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    number = next(line.removeprefix("torch==") for line in pinned if line.startswith("torch=="))
    assert f"{number}+cpu" in _TRIED


@pytest.mark.skipif(not TRIED, reason="the whole of this torch is imported")
def test_every_method_and_verb_writes_the_same_bytes_without_the_rest_of_torch(tmp_path: Path) -> None:
    model = medium.build(tmp_path / "model", layers=2)
    methods = [name for name in METHODS.names() if METHODS.get(name).split is not None]
    program = """
        import_for_arithmetic()
        from svdconvert.verbs.decompose import decompose
        from svdconvert.artifact.options import SplitOptions
        from svdconvert.run import Run
        from svdconvert.verbs.merge import merge
        from svdconvert.verbs.to_lora import to_lora
        model, out, *methods = sys.argv[1:]
        for method in methods:
            decompose(model, f"{out}/{method}", SplitOptions(method=method, rank=4), Run(threads=1))
        merge(f"{out}/milora", f"{out}/merged", run=Run(threads=1))
        to_lora(f"{out}/milora", f"{out}/plain")
        print("torch._decomp" in sys.modules)
    """
    assert said(program, model, tmp_path / "part", *methods) == "False"
    for method in methods:
        decompose(model, tmp_path / "whole" / method, SplitOptions(method=method, rank=4), Run(threads=1))
    merge(tmp_path / "whole/milora", tmp_path / "whole/merged", run=Run(threads=1))
    to_lora(tmp_path / "whole/milora", tmp_path / "whole/plain")
    for made in (*methods, "merged", "plain"):
        whole, part = (tmp_path / kind / made for kind in ("whole", "part"))
        files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
        assert files
        assert [file for file in files if (whole / file).read_bytes() != (part / file).read_bytes()] == []


def test_what_was_left_out_comes_when_it_is_asked_for() -> None:
    program = """
        import os
        import_for_arithmetic()
        import torch
        whole_torch()
        shape = torch.cholesky_inverse(torch.empty(4, 4, device="meta")).shape
        print(torch.rand(1, generator=torch.Generator().manual_seed(0)).shape, shape, *os.environ.keys())
    """
    words = said(program)
    assert words.startswith("torch.Size([1]) torch.Size([4, 4])")
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in words


@pytest.mark.parametrize("part", _PARTS)
def test_who_imports_a_part_gets_it(part: str) -> None:
    program = """
        import_for_arithmetic()
        from importlib import import_module
        package, _, name = sys.argv[1].rpartition(".")
        before = hasattr(sys.modules[package], name)
        part = import_module(sys.argv[1])
        print(part.__file__, getattr(sys.modules[package], name) is part, before)
    """
    file, same, before = said(program, part).split()
    assert before == str(not TRIED), "an empty module was left"
    assert Path(file).is_relative_to(Path(torch.__file__).parent)
    assert same == "True"


@pytest.mark.parametrize(
    "before",
    [
        "import svdconvert.importing; svdconvert.importing._TRIED = ()",
        "import svdconvert.importing; svdconvert.importing._installed = lambda: '9.9.9'",
        "import torch",
    ],
)
def test_another_torch_is_imported_whole(before: str) -> None:
    program = """
        import_for_arithmetic()
        print("torch._decomp" in sys.modules, "torch._meta_registrations" in sys.modules)
    """
    assert said(program, before=before) == "True True"


def test_a_plug_in_of_others_finds_all_of_torch(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text("import torch\nMETHOD = torch.Generator()\n")
    info = tmp_path / "stranger-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[svdconvert.methods]\nstranger = stranger:METHOD\n")
    program = """
        sys.path.insert(0, sys.argv[1])
        import_for_arithmetic()
        from svdconvert.method import METHODS
        print(type(METHODS.get("stranger")).__name__)
    """
    assert said(program, tmp_path) == "Generator"


def test_the_program_imports_the_part(tmp_path: Path) -> None:
    program = """
        import svdconvert.cli
        sys.argv[1:] = ["decompose", sys.argv[1], "-o", sys.argv[2], "--rank", "4"]
        try:
            svdconvert.cli.app()
        except SystemExit:
            print("torch._decomp" in sys.modules)
    """
    words = said(program, medium.build(tmp_path / "model", layers=1), tmp_path / "out")
    assert words.splitlines()[-1] == str(not TRIED)


@pytest.mark.skipif(not TRIED, reason="the whole of this torch is imported")
def test_every_verb_of_arithmetic_does_with_the_part_what_it_does_with_the_whole(tmp_path: Path) -> None:
    save(random_model(vocabulary=256), tmp_path / "model.pth", torch.float32)
    program = """
        from typer.testing import CliRunner
        from svdconvert.cli import app
        model, out = sys.argv[1:]
        for words in (
            ["decompose", model, "-o", f"{out}/milora", "--rank", "4", "--method", "milora"],
            ["verify", f"{out}/milora"],
            ["to-lora", f"{out}/milora", "-o", f"{out}/lora", "--rank", "2"],
            ["to-lora", f"{out}/milora", "-o", f"{out}/theirs", "--format", "rwkv-peft"],
            ["merge", f"{out}/milora", "-o", f"{out}/merged", "--rounding", "stochastic"],
            ["merge", f"{out}/lora", "-o", f"{out}/again", "--base", model],
            ["decompose", model, "-o", f"{out}/pissa", "--rank", "4"],
        ):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, (done.output, done.stderr, done.exception)
            if words[0] == "verify":
                print("torch._decomp" in sys.modules)
    """
    runs = {"part": "", "whole": "import torch"}
    assert {
        name: said(program, tmp_path / "model.pth", tmp_path / name, before=before)
        for name, before in runs.items()
    } == {"part": "False", "whole": "True"}
    files = [path for path in (tmp_path / "whole").rglob("*") if path.suffix in (".safetensors", ".pth")]
    assert len(files) == 8
    for file in files:
        assert file.read_bytes() == (tmp_path / "part" / file.relative_to(tmp_path / "whole")).read_bytes()
