"""--plan writes nothing; its counts, sizes and errors are those of the run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from svdconvert import Run, SplitOptions, decompose
from tests.conftest import Build
from tests.program import content, refused, succeeded
from tests.reading import readable, write_sums
from tests.rwkv6 import random_model, save
from tests.stock import tensors, trained_from

RUN = Run(device="cpu", threads=1)


def planned(*words: object) -> dict[str, Any]:
    """The document of a plan."""
    found: dict[str, Any] = json.loads(succeeded(*words, "--plan", "--json").out)
    return found


def stored_bytes(directory: Path) -> int:
    """Bytes of all tensors below a directory, without headers."""
    total = 0
    for file in directory.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            values = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 (no dict)
        total += sum(value.numel() * value.element_size() for value in values)
    return total


@pytest.fixture(scope="module")
def model(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return readable(checkpoint("llama", tied=False), tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows=10)


def metrics(directory: Path) -> list[Mapping[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--rank", 4],
        ["--rank", 3, "--method", "lora", "--targets", "q_proj,v_proj", "--train-also", "norms"],
        ["--rank", 4, "--method", "sorsa"],
        ["--method", "full"],
        ["--rank", 4, "--packing", "--max-length", 64],
    ],
    ids=str,
)
def test_a_plan_of_training_counts_what_the_run_does(
    words: list[Any], model: Path, rows: Path, tmp_path: Path
) -> None:
    command = ["train", model, "--data", rows, "--eval-rows", 2, "--epochs", 2, "--batch-size", 3, *words]
    before = content(model)
    plan = planned(*command)
    assert content(model) == before
    assert [*tmp_path.iterdir()] == []
    out = tmp_path / "out"
    succeeded(*command, "-o", out)
    logged = metrics(out)
    assert (plan["steps"], plan["loss_tokens"]) == (len(logged), logged[-1]["tokens"])
    assert plan["loss_tokens"] < plan["tokens"]
    assert plan["written_bytes"] == stored_bytes(out)
    assert plan["held_out_rows"] == 2
    assert plan["epochs"] == 2
    base = AutoModelForCausalLM.from_pretrained(model)
    assert plan["parameters"] == sum(parameter.numel() for parameter in base.parameters())
    if "full" in words:
        assert plan["trained_parameters"] == plan["parameters"]
    else:
        trained = json.loads(succeeded("inspect", out, "--json").out)["details"]["trained_parameters"]
        norms = sum(value.numel() for name, value in base.state_dict().items() if "norm" in name)
        assert plan["trained_parameters"] == trained + (norms if "norms" in words else 0)


@pytest.mark.parametrize(("length", "cut", "left_out"), [(512, 0.0, 0.0), (34, 1.0, 0.0)])
def test_a_plan_of_a_decomposed_directory_says_which_rows_are_cut(
    length: int, cut: float, left_out: float, model: Path, rows: Path, tmp_path: Path
) -> None:
    decompose(model, tmp_path / "split", SplitOptions(rank=4), RUN)
    before = content(tmp_path)
    plan = planned("train", tmp_path / "split", "--data", rows, "--max-length", length)
    assert (plan["cut"], plan["left_out"]) == (cut, left_out)
    assert plan["longest_row"] > 34
    assert plan["rows"] == 10
    assert content(tmp_path) == before


def test_a_plan_refuses_what_the_run_refuses(model: Path, rows: Path, tmp_path: Path) -> None:
    decompose(model, tmp_path / "split", SplitOptions(rank=4), RUN)
    split = ["train", tmp_path / "split", "--data", rows, "--plan"]
    refused(*split, "--rank", 8, words=["--rank", "decomposed already"])
    for words in (["--targets", "q_proj"], ["--alpha", 8], ["--rslora"]):
        refused(*split, *words, words=[words[0], "decomposed already"])
    full = ["train", model, "--data", rows, "--method", "full", "--plan"]
    refused(*full, "--alpha", 8, words=["--alpha", "changes nothing"])
    lost = ["train", model, "--rank", 4, "--data", tmp_path / "none.jsonl", "--plan"]
    refused(*lost, words=["none.jsonl"])


def test_a_plan_of_to_lora_has_the_error_of_every_rank(model: Path, tmp_path: Path) -> None:
    decompose(model, tmp_path / "split", SplitOptions(rank=4), RUN)
    trained = trained_from(tmp_path / "split", tmp_path / "trained")
    words = ["to-lora", trained, "--residual", tmp_path / "split"]
    plan = planned(*words)
    assert (plan["rank"], plan["relative_error"], plan["changed"]) == (8, 0.0, True)
    assert [row["rank"] for row in plan["ranks"]] == [1, 2, 4]
    succeeded(*words, "-o", tmp_path / "whole")
    assert plan["written_bytes"] == stored_bytes(tmp_path / "whole")
    pieces = tensors(tmp_path / "whole")
    names = [name for name in pieces if "lora_B" in name]
    changes = [pieces[name].double() @ pieces[name.replace("lora_B", "lora_A")].double() for name in names]
    spectra = [torch.linalg.svdvals(change).square() for change in changes]
    total = sum(float(one.sum()) for one in spectra)
    for row in plan["ranks"]:
        lost = sum(float(one[row["rank"] :].sum()) for one in spectra)
        assert row["error"] == pytest.approx((lost / total) ** 0.5, abs=1e-6)
        assert row["budget_error"] <= row["error"] + 1e-9
        out = tmp_path / f"rank-{row['rank']}"
        succeeded(*words, "-o", out, "--rank", row["rank"])
        assert row["bytes"] == stored_bytes(out)
    untrained = planned("to-lora", tmp_path / "split")
    assert untrained["changed"] is False


@pytest.mark.parametrize(("words", "cast"), [([], False), (["--dtype", "float32"], True)])
def test_a_plan_of_a_conversion_has_the_size_of_the_result(
    words: list[str], cast: bool, tmp_path: Path
) -> None:
    source = save(random_model(), tmp_path / "m.pth", torch.bfloat16)
    command = ["convert", source, "--layout", "hf", *words]
    plan = planned(*command)
    assert [*tmp_path.iterdir()] == [source]
    succeeded(*command, "-o", tmp_path / "out")
    assert plan["written_bytes"] == stored_bytes(tmp_path / "out")
    assert plan["files"] == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert plan["tensors"] == len(tensors(tmp_path / "out"))
    assert bool(plan["cast"]) == cast
    assert plan["read_bytes"] * (2 if cast else 1) == plan["written_bytes"]


def test_a_plan_of_a_push_names_the_files_and_needs_no_network(model: Path, tmp_path: Path) -> None:
    decompose(model, tmp_path / "split", SplitOptions(rank=4), RUN)
    plan = planned("push", tmp_path / "split", "me/name", "--private")
    assert {"model.safetensors", "svdconvert.json", "config.json"} <= plan["files"].keys()
    assert plan["bytes"] == sum(plan["files"].values())
    size = (tmp_path / "split" / "model.safetensors").stat().st_size
    assert plan["files"]["model.safetensors"] == size
    assert (plan["repository"], plan["private"]) == ("me/name", True)


@pytest.mark.parametrize("command", ["combine", "merge"])
def test_a_plan_of_several_adapters_has_the_size_of_the_result(
    command: str, model: Path, tmp_path: Path
) -> None:
    decompose(model, tmp_path / "split", SplitOptions(rank=4), RUN)
    one = trained_from(tmp_path / "split", tmp_path / "one")
    words: list[object] = ["to-lora", one, "--residual", tmp_path / "split", "-o", tmp_path / "lora"]
    succeeded(*words)
    pair = [command, tmp_path / "lora", tmp_path / "lora", "--base", model]
    pair += ["--weights", "0.5,0.25"]
    plan = planned(*pair)
    assert not (tmp_path / "out").exists()
    succeeded(*pair, "-o", tmp_path / "out")
    assert plan["written_bytes"] == stored_bytes(tmp_path / "out")
