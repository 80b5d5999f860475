"""base + LORA == MERGED by stock transformers and PEFT, at any scales before and after training."""

import json
import shutil
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from svdconvert.commands.inspect import inspect
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.commands.verify import verify
from svdconvert.manifest.schema import read_manifest
from tests.program import refused
from tests.stock import WEIGHTS, adapted, logits, plain, start_of, tensors, trained_from
from tests.ways import REBASED, WAYS, chosen, every_way

Build = Callable[..., Path]
Matrix = NDArray[np.float64]

SCALES: dict[str, dict[str, Any]] = {
    "one scale": {"alpha": 7.0},
    "rslora and patterns": {
        "rslora": True,
        "rank_pattern": {"attn.q": 7, "*.layers.1.mlp.*": 2},
        "alpha_pattern": {"attn": 3.0, "*.layers.0.mlp.up*": 9.0},
    },
}
every_scale = pytest.mark.parametrize("scales", SCALES)


def product(factors: dict[str, Any], module: str, scale: float) -> Matrix:
    """scale * B core A in float64, by numpy."""
    found = {
        letter: factors[f"base_model.model.{module}.lora_{letter}.weight"].astype(np.float64)
        for letter in "ABSR"
        if f"base_model.model.{module}.lora_{letter}.weight" in factors
    }
    core = np.diag(found["S"]) if "S" in found else found.get("R", np.eye(len(found["A"])))
    result: Matrix = scale * found["B"] @ core @ found["A"]
    return result


@every_scale
@every_way
def test_base_and_lora_is_the_merged_model_at_any_scales(
    way: str, scales: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    out = decomposed(base, **chosen(way), **SCALES[scales])
    trained = trained_from(out, tmp_path / "trained")
    config = json.loads((trained / "adapter_config.json").read_text())
    # As after training with another alpha than the initial adapter had: 1.5 times as much everywhere.
    patterns = {key: 1.5 * alpha for key, alpha in config["alpha_pattern"].items()}
    config |= {"lora_alpha": 1.5 * config["lora_alpha"], "alpha_pattern": patterns}
    (trained / "adapter_config.json").write_text(json.dumps(config))
    to_lora(trained, tmp_path / "lora", residual=str(out))
    merge(trained, tmp_path / "merged", residual=str(out))
    merged = logits(plain(tmp_path / "merged"))
    assert (merged - logits(plain(base))).abs().max() > 0.01, "the adapter of this test changes nothing"
    assert (logits(adapted(base, tmp_path / "lora")) - merged).abs().max() < 1e-5 * merged.abs().max()
    after, before = load_file(trained / WEIGHTS), load_file(start_of(out) / WEIGHTS)
    found, weights = tensors(tmp_path / "merged"), tensors(base)
    for name, matrix in read_manifest(out).matrices.items():
        change = product(after, matrix.module, 1.5 * matrix.scale) - product(
            before, matrix.module, matrix.scale
        )
        assert np.abs(found[name].double().numpy() - (weights[name].double().numpy() + change)).max() < 1e-5


@every_scale
@pytest.mark.parametrize("way", [way for way, method in WAYS.items() if method.peft_type == "LORA"])
def test_stock_peft_loads_initial_and_trained_adapters_of_the_type_lora(
    way: str, scales: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    out = decomposed(base, **chosen(way), **SCALES[scales])
    weights = out if way in REBASED else base
    wanted = logits(plain(base))
    initial = logits(adapted(weights, out, subfolder=start_of(out).name))
    assert (initial - wanted).abs().max() < 1e-5 * wanted.abs().max()
    trained = trained_from(out, tmp_path / "trained")
    merge(trained, tmp_path / "merged", residual=str(out))
    merged = logits(plain(tmp_path / "merged"))
    assert (logits(adapted(weights, trained)) - merged).abs().max() < 1e-5 * merged.abs().max()


@pytest.mark.parametrize("way", [way for way, method in WAYS.items() if method.peft_type != "LORA"])
def test_stock_peft_refuses_what_it_would_load_wrongly(
    way: str, checkpoint: Build, decomposed: Build
) -> None:
    out = decomposed(checkpoint("llama", dtype=torch.float32), **chosen(way))
    with pytest.raises((KeyError, ValueError), match=WAYS[way].peft_type):
        adapted(checkpoint("llama", dtype=torch.float32), out, subfolder=start_of(out).name)


@every_way
def test_rank_and_scale_are_as_the_patterns_say(way: str, checkpoint: Build, decomposed: Build) -> None:
    out = decomposed(checkpoint("llama", dtype=torch.float32), **chosen(way), **SCALES["rslora and patterns"])
    matrices = read_manifest(out).matrices
    factors = load_file(start_of(out) / WEIGHTS)
    for name, matrix in matrices.items():
        low = ".layers.1.mlp." in name
        assert matrix.rank == (7 if "q_proj" in name else 2 if low else 4)
        alpha = 3.0 if "self_attn" in name else 9.0 if ".layers.0.mlp.up" in name else matrix.rank
        assert matrix.scale == pytest.approx(alpha / sqrt(matrix.rank))
        assert len(factors[f"base_model.model.{matrix.module}.lora_A.weight"]) == matrix.rank
    assert verify(out).passed
    trained = sum(factor.size for name, factor in factors.items() if name.split(".")[-2] in WAYS[way].trains)
    assert inspect(out).details["trained_parameters"] == trained


@pytest.mark.parametrize("way", ["lora-xs", "lora-fa", "lora-fa random", "lora"])
def test_if_a_is_frozen_or_the_initial_adapter_is_zero_the_lora_keeps_the_rank(
    way: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    out = decomposed(checkpoint("llama", dtype=torch.float32), **chosen(way))
    trained = shutil.copytree(trained_from(out, tmp_path / "moved"), tmp_path / "trained")
    assert to_lora(trained, tmp_path / "lora", residual=str(out)).result.rank == 4


ODD: dict[str, tuple[list[str], list[str]]] = {
    "an unknown init": (["--method", "lora-fa", "--init", "svdd"], ["no init 'svdd'", "did you mean svd?"]),
    "an init of a method that has only one": (["--init", "svd"], ["no init 'svd'", "has one only"]),
    "a pattern without a number": (["--rank-pattern", "attn"], ["--rank-pattern", "TARGET=NUMBER"]),
    "a pattern with a word": (["--rank-pattern", "attn=x"], ["--rank-pattern", "'x'", "valid integer"]),
    "a pattern for nothing": (
        ["--targets", "attn", "--alpha-pattern", "mlp=2"],
        ["'mlp'", "none of the decomposed matrices", "targets"],
    ),
    "a rank above a matrix's": (
        ["--rank-pattern", "attn.k=17"],
        ["rank 17 is above", "k_proj", "16 or less"],
    ),
}


@pytest.mark.parametrize("fault", ODD)
def test_what_cannot_be_decomposed_is_refused(fault: str, checkpoint: Build, tmp_path: Path) -> None:
    typed, words = ODD[fault]
    refused("decompose", checkpoint("llama"), "-o", tmp_path / "out", "--rank", 4, *typed, words=words)
    assert not list(tmp_path.iterdir())
