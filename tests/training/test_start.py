"""What training starts from is what decompose wrote, and what the user asked for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from svdconvert import Run, SplitOptions, decompose, train
from svdconvert.errors import ArtifactError, RecipeError, SvdConvertError
from tests.program import refused, succeeded
from tests.training.small_runs import text_options

Decomposed = Callable[[str], Path]


@pytest.fixture
def decomposed(base: Path, tmp_path: Path) -> Decomposed:
    """method -> what decompose wrote, at rank 4."""

    def make(method: str) -> Path:
        decompose(base, tmp_path / method, SplitOptions(method=method, rank=4), Run(threads=1))
        return tmp_path / method

    return make


def flip_a_bit(path: Path, name: str) -> None:
    """Change the last bit of a tensor in a safetensors file."""
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    end = json.loads(content[8 : 8 + header])[name]["data_offsets"][1]
    content[8 + header + end - 1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "pissa_init/adapter_model.safetensors"])
def test_no_tensor_of_the_directory_may_have_changed(
    file: str, decomposed: Decomposed, base: Path, tmp_path: Path
) -> None:
    start = decomposed("pissa")
    with safe_open(start / file, "pt") as tensors:
        names = sorted(tensors.keys())
    for name in (names[0], names[-1]):
        flip_a_bit(start / file, name)
        with pytest.raises(ArtifactError, match=f"{file}: {name} is not the tensor that .* lists"):
            train(start, tmp_path / "out", text_options(base))
        flip_a_bit(start / file, name)
    assert not list(tmp_path.glob("out*"))
    train(start, tmp_path / "out", text_options(base))


def test_no_matrix_of_the_base_may_have_changed(decomposed: Decomposed, base: Path, tmp_path: Path) -> None:
    start = decomposed("lora")
    moved = shutil.copytree(base, tmp_path / "moved")
    name = "model.layers.1.mlp.gate_proj.weight"
    flip_a_bit(moved / "model.safetensors", name)
    with pytest.raises(ArtifactError, match=f"{name} has changed since the adapter was made"):
        train(start, tmp_path / "out", text_options(base), base=str(moved))


@pytest.mark.parametrize(
    ("split", "named"),
    [
        (SplitOptions(method="milora", rank=4), "method"),
        (SplitOptions(rank=8), "rank"),
        (SplitOptions(rank=8, targets=("attn",)), "rank, targets"),
        (SplitOptions(method="full", rank=4), "method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_decomposed_directory_is_not_split_again(
    split: SplitOptions, named: str, decomposed: Decomposed, base: Path, tmp_path: Path
) -> None:
    start = decomposed("pissa")
    with pytest.raises(RecipeError, match=f"decomposed already, by pissa at rank 4, so {named} would change"):
        train(start, tmp_path / "out", text_options(base), split=split)


def test_the_command_line_refuses_options_that_split(
    decomposed: Decomposed, base: Path, tmp_path: Path
) -> None:
    command = ("train", decomposed("pissa"), "-o", tmp_path / "out", "--data", base.parent / "sums.jsonl")
    for given in (("--rank", 8), ("--rank", 4), ("--method", "milora"), ("--method", "pissa")):
        refused(*command, *given, words=["decomposed already", given[0], "leave"])
    refused(*command, "--rank", 8, "--method", "milora", words=["--method, --rank would change nothing"])


def test_one_recipe_serves_decompose_and_train(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {
        "seed": 3,
        "decompose": {"rank": 4, "method": "milora", "targets": ["attn", "mlp.up"], "max_shard_size": "1GB"},
        "train": {"data": str(base.parent / "sums.jsonl"), "steps": 1, "max_length": 48},
    }
    recipe.write_text(yaml.safe_dump(content))
    succeeded("decompose", base, "-o", tmp_path / "start", "--recipe", recipe)
    succeeded("train", tmp_path / "start", "-o", tmp_path / "out", "--recipe", recipe)
    content["decompose"] = {"rank": 8, "method": "milora"}
    recipe.write_text(yaml.safe_dump(content))
    said = succeeded("train", tmp_path / "start", "-o", tmp_path / "other", "--recipe", recipe).err
    assert "keeps its own split: rank of the recipe would need another decompose" in said


def test_an_interrupted_run_does_not_continue_with_another_template(base: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def watch(log: object, steps: int) -> None:
        if getattr(log, "step", 0) == 3:
            raise Stop

    model = shutil.copytree(base, tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}] * 12
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    options = text_options(base, data=str(tmp_path / "chats.jsonl"), save_every=1)
    split = SplitOptions(method="lora", rank=4)
    with pytest.raises(Stop):
        train(model, tmp_path / "out", options, Run(threads=1), split=split, watch=watch)
    (model / "chat_template.jinja").write_text(template.replace("{{ m", "{{ '1 ' + m"))
    with pytest.raises(SvdConvertError, match="what the tokenizer and its chat template make of the rows"):
        train(model, tmp_path / "out", options, Run(threads=1), split=split)
    (model / "chat_template.jinja").write_text(template)
    train(model, tmp_path / "out", options, Run(threads=1), split=split)
