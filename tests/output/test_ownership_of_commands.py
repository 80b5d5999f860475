"""For every command that writes: what others have under the names that it needs stays as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert import ConvertOptions, LoraOptions, Run, SplitOptions, convert, decompose, to_lora
from tests import rwkv6
from tests.commands.test_extract import tuned_from
from tests.conftest import Build
from tests.program import content, refused, succeeded, svdconvert
from tests.reading import readable, write_sums

RUN = Run(device="cpu", threads=1)
COMMANDS: dict[str, list[Any]] = {
    "merge": ["merge", Path("lora"), "--base", Path("base")],
    "merge of several": ["merge", Path("lora"), Path("second"), "--base", Path("base")],
    "to-lora": ["to-lora", Path("lora"), "--base", Path("base")],
    "to-lora --format mlx": ["to-lora", Path("lora"), "--format", "mlx"],
    "combine": ["combine", Path("lora"), Path("second"), "--base", Path("base")],
    "combine of checkpoints": ["combine", Path("base"), Path("tuned")],
    "combine --config": ["combine", "--config", Path("lora/merge.yaml")],
    "extract": ["extract", Path("base"), Path("tuned"), "--rank", 2],
    "convert": ["convert", Path("hf"), "--layout", "blinkdl"],
    "train": ["train", Path("split"), "--data", Path("lora/rows.jsonl"), "--steps", 1],
}
every_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture(scope="module")
def home(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of all commands. In the manifest of `lora` are rows, a merge file and a recipe."""
    home = tmp_path_factory.mktemp("inputs")
    base = readable(checkpoint("llama", dtype=torch.float32), home / "base")
    tuned_from(base, home / "tuned")
    options = SplitOptions(rank=2, method="lora", targets="attn.q")
    decompose(base, home / "split", options, RUN)
    decompose(base, home / "other", SplitOptions(rank=3, method="lora", targets="attn.v"), RUN)
    to_lora(home / "split", home / "lora", LoraOptions(), RUN)
    to_lora(home / "other", home / "second", LoraOptions(), RUN)
    rwkv6.save(rwkv6.random_model(layers=1, width=32, head=16), home / "rwkv.pth")
    convert(home / "rwkv.pth", home / "hf", ConvertOptions(layout="hf"), RUN)
    write_sums(home / "lora" / "rows.jsonl")
    models = [{"model": str(home / name), "parameters": {"weight": 0.5}} for name in ("base", "tuned")]
    merge_file = {"models": models, "merge_method": "linear"}
    (home / "lora" / "merge.yaml").write_text(json.dumps(merge_file))
    (home / "lora" / "recipe.yaml").write_text("model: unused\n")
    manifest = json.loads((home / "lora" / "svdconvert.json").read_text())
    manifest["sidecars"] |= {"rows.jsonl": "0" * 16, "merge.yaml": "0" * 16}
    manifest["sidecars"] |= {"recipe.yaml": "0" * 16}
    (home / "lora" / "svdconvert.json").write_text(json.dumps(manifest))
    return home


def words_of(command: str, home: Path) -> list[Any]:
    return [home / word if isinstance(word, Path) else word for word in COMMANDS[command]]


@every_command
def test_nothing_that_was_given_is_overwritten(command: str, home: Path, tmp_path: Path) -> None:
    """Not even a location that is only compared, a file in a directory of ours, or by another name."""
    own = tmp_path / "own"
    shutil.copytree(home, own)
    (tmp_path / "link").symlink_to(own)
    words = words_of(command, own)
    before = content(own)
    places = {word if word.is_dir() else word.parent for word in words if isinstance(word, Path)}
    for place in places:
        for out in (place, tmp_path / "link" / place.name, place / ".." / place.name):
            refused(*words, "-o", out, "--overwrite", words=[out])
    assert content(own) == before
    assert {path.name for path in tmp_path.iterdir()} == {"own", "link"}


@every_command
@pytest.mark.parametrize("more", [[], ["--plan"]], ids=["run", "plan"])
def test_the_recipe_is_not_overwritten(command: str, more: list[str], home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "lora", tmp_path / "lora")
    words = [*words_of(command, home), "--recipe", tmp_path / "lora" / "recipe.yaml"]
    if words[0] == "convert" and more:
        pytest.skip("convert has no plan")
    before = content(tmp_path)
    refused(*words, "-o", tmp_path / "lora", "--overwrite", *more, words=["recipe.yaml, which is an input"])
    assert content(tmp_path) == before


@every_command
def test_a_plan_refuses_the_output_that_the_command_would_refuse(
    command: str, home: Path, tmp_path: Path
) -> None:
    if command == "convert":
        pytest.skip("convert has no plan")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    words = [*words_of(command, home), "-o", tmp_path / "out", "--plan"]
    refused(*words, words=[f"{tmp_path / 'out'} exists and is not empty"])
    ended = svdconvert(*words, "--push", "me/out")
    assert ended.status == 2
    assert "--push changes nothing with --plan" in " ".join(ended.err.split())


@every_command
@pytest.mark.parametrize("foreign", ["out.partial", "out.partial/sub", "out", "a link", "a journal"])
def test_what_somebody_else_has_there_stays(command: str, foreign: str, home: Path, tmp_path: Path) -> None:
    words = words_of(command, home)
    if foreign == "a link":
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "thesis.txt").write_text("precious")
        (tmp_path / "out.partial").symlink_to(tmp_path / "there")
    else:
        place = tmp_path / foreign.replace("a journal", "out.partial")
        place.mkdir(parents=True)
        (place / "thesis.txt").write_text("precious")
    if foreign == "a journal":
        (tmp_path / "out.partial" / "journal.jsonl").write_text('{"line": {"verb": "merge"}}\n')
    before = content(tmp_path)
    refused(*words, "-o", tmp_path / "out", "--overwrite", words=[tmp_path / "out"])
    assert content(tmp_path) == before


@every_command
def test_only_the_output_of_svdconvert_is_replaced(command: str, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "second", tmp_path / "out")
    for name in ("out.replaced", ".out.replaced-1-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious")
    succeeded(*words_of(command, home), "-o", tmp_path / "out", "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.replaced", ".out.replaced-1-0"}
    assert (tmp_path / "out.replaced" / "thesis.txt").read_text() == "precious"
    assert (tmp_path / ".out.replaced-1-0" / "thesis.txt").read_text() == "precious"
    assert "rows.jsonl" not in content(tmp_path / "out")
