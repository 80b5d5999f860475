"""What cannot be done is refused in one sentence, with status 1, and nothing is left or lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Build
from tests.program import content, refused, succeeded, svdconvert
from tests.tiny import SHARDED

Damage = Callable[[Path], object]
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-"
TARGET = "model.layers.0.self_attn.q_proj.weight"
AGAIN = "fetch it again"


@pytest.fixture
def model(checkpoint: Build, tmp_path: Path) -> Path:
    """A tiny sharded checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("llama", shard=SHARDED), tmp_path / "model"))


def first(model: Path) -> Path:
    return next(model.glob(f"{FIRST}*"))


def holder(model: Path, name: str = TARGET) -> Path:
    """The shard that holds a tensor."""
    return model / json.loads((model / INDEX).read_text())["weight_map"][name]


def cut(model: Path) -> None:
    whole = first(model).read_bytes()
    first(model).write_bytes(whole[: len(whole) // 2])


def lie(model: Path) -> None:
    whole = first(model).read_bytes()
    first(model).write_bytes((10**7).to_bytes(8, "little") + whole[8:])


def garble(model: Path) -> None:
    whole = first(model).read_bytes()
    first(model).write_bytes(whole[:8] + b"[" + whole[9:])


def place(name: str, file: str) -> Damage:
    """Let the index place a tensor in a file."""

    def damage(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        index["weight_map"][name] = file.format(first=first(model).name)
        (model / INDEX).write_text(json.dumps(index))

    return damage


def store(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Store the target otherwise."""

    def damage(model: Path) -> None:
        tensors = load_file(holder(model))
        tensors[TARGET] = change(tensors[TARGET])
        save_file(tensors, holder(model), metadata={"format": "pt"})

    return damage


def put(value: float) -> Damage:
    return store(
        lambda weight: weight.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(value).to(weight))
    )


def rewrite(file: str, text: str) -> Damage:
    return lambda model: (model / file).write_text(text)


def retype(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))


def poison(model: Path) -> None:
    """A .bin that would run code if it were unpickled."""
    for file in model.glob("model*"):
        file.unlink()
    torch.save({TARGET: shutil.rmtree}, model / "pytorch_model.bin")


DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "missing directory": (shutil.rmtree, ["model does not exist", "check the path"]),
    "empty directory": (
        lambda model: [file.unlink() for file in model.iterdir()],
        ["model is empty", "expected"],
    ),
    "truncated shard": (cut, [FIRST, "is truncated", AGAIN]),
    "header with a wrong length": (lie, [FIRST, "its header claims 10000000 bytes", AGAIN]),
    "header that is not JSON": (garble, [FIRST, "header is not a JSON object", AGAIN]),
    "index that names an absent shard": (
        place(TARGET, "model-00099.safetensors"),
        [INDEX, "model-00099.safetensors", "fetch the missing shard"],
    ),
    "index that names an absent tensor": (place("model.ghost", "{first}"), [INDEX, "model.ghost", FIRST]),
    "index that names a path outside": (
        place(TARGET, "../secret"),
        [INDEX, TARGET, "'../secret'", "outside"],
    ),
    "index that is not JSON": (rewrite(INDEX, "{"), [INDEX, AGAIN]),
    "config.json that is not JSON": (rewrite("config.json", "{oops"), ["config.json", "restore the file"]),
    "config.json that is missing": (
        lambda model: (model / "config.json").unlink(),
        ["config.json is missing"],
    ),
    "model type without a layout": (retype, ["'lama'", "did you mean llama?", "--layout"]),
    "int8 target": (store(lambda weight: weight.to(torch.int8)), [TARGET, "stored as I8", "convert"]),
    "fp8 target": (
        store(lambda weight: weight.to(torch.float8_e4m3fn)),
        [TARGET, "stored as F8_E4M3", "convert"],
    ),
    "target that is no matrix": (
        store(lambda weight: weight[None].contiguous()),
        [TARGET, "(1, 32, 32)", "targets"],
    ),
    "pickle that runs code": (poison, ["pytorch_model.bin", "was not unpickled", "safetensors"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_and_nothing_is_left(damage: str, model: Path, tmp_path: Path) -> None:
    break_it, words = DAMAGES[damage]
    break_it(model)
    before = content(tmp_path)
    refused("decompose", model, "-o", tmp_path / "out", "--rank", 4, words=words)
    assert content(tmp_path) == before


OPTIONS: dict[str, tuple[list[object], list[str]]] = {
    "unknown method": (
        ["--method", "pizza"],
        ["no method 'pizza'", "known: ", "lora, ", "did you mean pissa?"],
    ),
    "unknown layout": (["--layout", "lama"], ["no layout 'lama'", "qwen", "did you mean llama?"]),
    "rank above the matrix's own": (
        ["--rank", 33],
        ["rank 33", "self_attn.k_proj.weight (16, 32)", "--rank 16 or less"],
    ),
    "rank of zero": (["--rank", 0], ["decompose: --rank is 0", "greater than or equal to 1"]),
    "target that matches nothing": (
        ["--targets", "attn.w"],
        ["'attn.w' matches no matrix", "did you mean attn"],
    ),
    "one of two targets matches nothing": (
        ["--targets", "mlp,*.c_attn.*"],
        ["'*.c_attn.*' matches no matrix"],
    ),
    "target that is never decomposed": (
        ["--targets", "*embed*"],
        ["model.embed_tokens.weight", "never decomposed"],
    ),
    "size that is none": (["--max-shard-size", "5 bananas"], ["--max-shard-size is '5 bananas'", "5GB"]),
    "device that is not there": (["--device", "cuda:9"], ["cuda:9"]),
    "device that is unknown": (["--device", "abacus"], ["abacus"]),
    "tolerance of zero": (["--tol", 0], ["decompose: --tol", "greater than 0"]),
    "tolerance that JSON cannot say": (["--tol", "inf"], ["decompose: --tol is inf", "finite number"]),
    "alpha that is no number": (["--alpha", "nan"], ["decompose: --alpha is nan", "finite number"]),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_makes_no_sense_is_refused_and_nothing_is_left(
    option: str, model: Path, tmp_path: Path
) -> None:
    arguments, words = OPTIONS[option]
    before = content(tmp_path)
    rank = [] if "--rank" in arguments else ["--rank", 4]
    refused("decompose", model, "-o", tmp_path / "out", *rank, *arguments, words=words)
    assert content(tmp_path) == before


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_target_with_a_value_that_is_no_number_is_refused(value: str, model: Path, tmp_path: Path) -> None:
    whole = holder(model).read_bytes()
    put(float(value))(model)
    command = ("decompose", model, "-o", tmp_path / "out", "--rank", 4)
    refused(*command, words=[TARGET, "1 values that are NaN or Inf", "repair the checkpoint"])
    # It is seen when its turn comes: what was done before it waits for the same command.
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out.partial"}
    holder(model).write_bytes(whole)
    # What was done belongs to the checkpoint as it was.
    refused(*command, words=["out.partial", "has changed since", holder(model).name, "--overwrite"])
    succeeded(*command, "--overwrite")
    succeeded("decompose", model, "-o", tmp_path / "anew", "--rank", 4)
    assert content(tmp_path / "out") == content(tmp_path / "anew")


RECIPES: dict[str, tuple[str, list[str]]] = {
    "unknown key": (
        "model: m\nsed: 1\n",
        ["'sed'", "known: combine, convert, decompose, ", "did you mean seed?"],
    ),
    "unknown key of a section": ("decompose: {rnk: 4}\n", ["decompose", "'rnk'", "did you mean rank?"]),
    "value of the wrong type": ("decompose: {rank: many}\n", ["rank is 'many'", "integer"]),
    "value that is no choice": (
        "decompose: {svd: quick}\n",
        ["svd is 'quick'", "'fast', 'exact' or 'exact64'"],
    ),
    "section that is no mapping": ("decompose: [rank]\n", ["decompose is not a mapping"]),
    "list": ("- a\n", ["is not a mapping", "model, seed"]),
    "broken YAML": ("model: [\n", ["cannot be read as YAML"]),
}


@pytest.mark.parametrize("fault", RECIPES)
def test_a_wrong_recipe_is_refused_and_nothing_is_left(fault: str, model: Path, tmp_path: Path) -> None:
    text, words = RECIPES[fault]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    before = content(tmp_path)
    refused("decompose", model, "-o", tmp_path / "out", "--recipe", recipe, words=[recipe.name, *words])
    assert content(tmp_path) == before


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    refused("decompose", "m", "-o", tmp_path / "out", "--recipe", tmp_path / "no.yaml", words=["no.yaml"])


@pytest.mark.parametrize("extra", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_a_full_output_directory_keeps_its_content(extra: list[str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    words = [tmp_path / "out", "svdconvert did not write" if extra else "is not empty", "another -o"]
    refused("decompose", model, "-o", tmp_path / "out", "--rank", 4, *extra, words=words)
    assert content(tmp_path) == before


def test_an_output_that_is_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(
        "decompose", model, "-o", tmp_path / "out", "--rank", 4, words=["out exists and is not a directory"]
    )
    assert (tmp_path / "out").read_text() == "mine"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from svdconvert.errors import CheckpointError

    with pytest.raises(CheckpointError, match="does not exist"):
        svdconvert("decompose", tmp_path / "no", "-o", tmp_path / "out", "--debug")


def test_bad_usage_ends_with_status_2(model: Path, tmp_path: Path) -> None:
    for arguments in (
        ["decompose", model],
        ["decompose", "-o", tmp_path / "out"],
        ["decompose", model, "-o", tmp_path / "out", "--rank", "many"],
        ["decompose", model, "-o", tmp_path / "out", "--unknown"],
        ["merge"],
        ["list", "cities"],
        ["frobnicate"],
    ):
        ended = svdconvert(*arguments)
        assert ended.status == 2, arguments
        assert "Traceback" not in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_where_it_is_refused_it_can_be_done_when_mended(model: Path, tmp_path: Path) -> None:
    whole = first(model).read_bytes()
    cut(model)
    command = ("decompose", model, "-o", tmp_path / "out", "--rank", 4)
    refused(*command, words=["truncated"])
    first(model).write_bytes(whole)
    succeeded(*command)
