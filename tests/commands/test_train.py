"""Training from a decomposed directory and from a plain model, and what the other verbs make of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from svdconvert import (
    MergeOptions,
    Run,
    SplitOptions,
    SvdConvertError,
    TrainOptions,
    decompose,
    merge,
    read_manifest,
    to_lora,
    train,
)
from svdconvert.methods.base import METHODS, init_folder
from tests.conftest import Build
from tests.program import content, refused, succeeded
from tests.reading import readable, write_sums
from tests.stock import adapted, logits, plain, same_bytes, tensors

WEIGHTS = "adapter_model.safetensors"
OPTIONS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "max_length": 48,
    "lr": 1e-2,
    "eval_rows": 4,
    "eval_every": 2,
}
Chain = tuple[Path, Path, Path]

# One for every set of trained pieces, and with a residual or without.
TRAINED = ["lora", "lora-fa", "lora-xs", "pissa", "sorsa"]
every_method = pytest.mark.parametrize("method", TRAINED)


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("data") / "sums.jsonl")


@pytest.fixture(scope="module")
def chain(checkpoint: Build, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Chain]:
    """method -> (base in float32, what decompose wrote, what train wrote); made once."""
    made: dict[str, Chain] = {}

    def make(method: str) -> Chain:
        if method not in made:
            home = tmp_path_factory.mktemp(method)
            base = readable(checkpoint("llama", dtype=torch.float32), home / "base")
            decompose(base, home / "start", SplitOptions(method=method, rank=4, alpha=8), Run(threads=1))
            train(home / "start", home / "trained", TrainOptions(data=str(sums), **OPTIONS), Run(threads=1))
            made[method] = base, home / "start", home / "trained"
        return made[method]

    return make


def metrics(trained: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]


@every_method
def test_the_trained_directory_holds_what_merge_and_to_lora_need(
    method: str, chain: Callable[[str], Chain]
) -> None:
    base, start, trained = chain(method)
    folder = init_folder(method)
    assert set(content(trained)) == {
        "adapter_config.json",
        WEIGHTS,
        "metrics.jsonl",
        "svdconvert.json",
        f"{folder}/adapter_config.json",
        f"{folder}/{WEIGHTS}",
    }
    assert content(trained / folder) == content(start / folder)
    manifest = read_manifest(trained)
    assert (manifest.kind, manifest.method, len(manifest.matrices)) == ("trained", method, 14)
    assert manifest.base is not None
    assert manifest.base.location == str(base)
    assert (manifest.residual is not None) == METHODS.get(method).residual
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, None)


@every_method
def test_only_the_trained_factors_change(method: str, chain: Callable[[str], Chain]) -> None:
    _, start, trained = chain(method)
    before, after = load_file(start / init_folder(method) / WEIGHTS), load_file(trained / WEIGHTS)
    assert before.keys() == after.keys()
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == METHODS.get(method).trains


@every_method
def test_the_metrics_have_one_line_per_step_and_the_loss_falls(
    method: str, chain: Callable[[str], Chain]
) -> None:
    lines = metrics(chain(method)[2])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    own = {"penalty"} if METHODS.get(method).penalty else set()
    assert all(line.keys() == {"step", "loss", "lr", "tokens"} | own for line in steps)
    assert [line["tokens"] for line in steps] == sorted(line["tokens"] for line in steps)
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [0, 2, 4]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"]
    drifts = [line for line in lines if "sigma_drift" in line]
    assert [line["step"] for line in drifts] == ([2, 4] if METHODS.get(method).residual else [])
    assert all(0 < line["sigma_drift"] < 1 and 0 <= line["u_rotation"] < 1 for line in drifts)


@every_method
def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(
    method: str, chain: Callable[[str], Chain], sums: Path, tmp_path: Path
) -> None:
    _, start, trained = chain(method)
    torch.manual_seed(99)
    train(start, tmp_path / "again", TrainOptions(data=str(sums), **OPTIONS), Run(threads=1))
    assert content(tmp_path / "again") == content(trained)
    train(start, tmp_path / "other", TrainOptions(data=str(sums), **OPTIONS, seed=1), Run(threads=1))
    assert not same_bytes(tensors(tmp_path / "other"), tensors(trained))


@every_method
def test_training_a_plain_model_equals_training_what_decompose_writes(
    method: str, chain: Callable[[str], Chain], sums: Path, tmp_path: Path
) -> None:
    base, _, trained = chain(method)
    split = SplitOptions(method=method, rank=4, alpha=8)
    train(base, tmp_path / "direct", TrainOptions(data=str(sums), **OPTIONS), Run(threads=1), split=split)
    assert same_bytes(tensors(tmp_path / "direct"), tensors(trained))
    folder = init_folder(method)
    assert content(tmp_path / "direct" / folder) == content(trained / folder)
    assert metrics(tmp_path / "direct") == metrics(trained)
    merge(tmp_path / "direct", tmp_path / "merged")
    merge(trained, tmp_path / "same")
    assert same_bytes(tensors(tmp_path / "merged"), tensors(tmp_path / "same"))


@every_method
def test_the_trained_the_merged_and_the_lora_model_compute_the_same(
    method: str, chain: Callable[[str], Chain], tmp_path: Path
) -> None:
    base, start, trained = chain(method)
    merge(trained, tmp_path / "merged")
    to_lora(trained, tmp_path / "lora")
    kind, wanted = METHODS.get(method), logits(adapted(base, tmp_path / "lora"))
    assert (wanted - logits(plain(base))).abs().max() > 0.01
    assert (logits(plain(tmp_path / "merged")) - wanted).abs().max() < 1e-5
    if kind.peft_type == "LORA":  # PEFT, on the weights that training used.
        assert (logits(adapted(start if kind.residual else base, trained)) - wanted).abs().max() < 1e-5
    rank = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"]
    assert rank == (8 if kind.residual and "lora_A" in kind.trains else 4)


@pytest.mark.parametrize("method", [name for name in TRAINED if METHODS.get(name).residual])
def test_merging_from_the_base_is_merging_from_a_float32_residual(
    method: str, chain: Callable[[str], Chain], tmp_path: Path
) -> None:
    _, _, trained = chain(method)
    assert merge(trained, tmp_path / "one", MergeOptions(side="base")).result.side == "base"
    assert merge(trained, tmp_path / "other", MergeOptions(side="residual")).result.side == "residual"
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=2e-6) for name in one)


def test_from_the_command_line(chain: Callable[[str], Chain], sums: Path, tmp_path: Path) -> None:
    base, start, _ = chain("pissa")
    arguments = ("--data", sums, "--steps", 2, "--max-length", 48, "--threads", 1)
    shown = succeeded("train", start, "-o", tmp_path / "one", *arguments).out
    assert re.search(r"^steps +2 *$", shown, re.MULTILINE)
    assert f"svdconvert merge {tmp_path / 'one'} -o MERGED" in shown
    assert read_manifest(tmp_path / "one").options["lr"] == METHODS.get("pissa").learning_rate
    succeeded("train", base, "-o", tmp_path / "two", "--method", "lora", "--rank", 3, *arguments)
    assert read_manifest(tmp_path / "two").options["lr"] == METHODS.get("lora").learning_rate
    assert {matrix.rank for matrix in read_manifest(tmp_path / "two").matrices.values()} == {3}


def test_a_directory_that_cannot_be_trained_is_refused(
    chain: Callable[[str], Chain], sums: Path, tmp_path: Path
) -> None:
    trained = chain("pissa")[2]
    words = [trained, "is a trained directory", "what decompose wrote"]
    refused("train", trained, "-o", tmp_path / "out", "--data", sums, words=words)


def test_a_missing_base_is_named_with_the_option_that_gives_it(
    checkpoint: Build, sums: Path, tmp_path: Path
) -> None:
    base = readable(checkpoint("llama"), tmp_path / "base")
    succeeded("decompose", base, "-o", tmp_path / "start", "--method", "lora", "--rank", 4)
    base.rename(tmp_path / "moved")
    arguments = ("--data", sums, "--steps", 1, "--max-length", 48)
    command = ("train", tmp_path / "start", "-o", tmp_path / "out", *arguments)
    refused(*command, words=["is not found", "--base"])
    succeeded(*command, "--base", tmp_path / "moved")
    succeeded("merge", tmp_path / "out", "-o", tmp_path / "merged", "--base", tmp_path / "moved")


def test_an_error_before_the_first_checkpoint_leaves_nothing(
    chain: Callable[[str], Chain], sums: Path, tmp_path: Path
) -> None:
    def watch(log: object, steps: int) -> None:
        raise SvdConvertError("seen enough")

    with pytest.raises(SvdConvertError, match="seen enough"):
        train(chain("pissa")[1], tmp_path / "out", TrainOptions(data=str(sums), **OPTIONS), watch=watch)
    assert list(tmp_path.iterdir()) == []
