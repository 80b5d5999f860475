"""to-lora truncates a change with the least error, and says what it lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svdconvert.commands.to_lora import to_lora
from svdconvert.config.options import LoraOptions
from svdconvert.config.recipe import Recipe, options
from svdconvert.errors import RecipeError
from svdconvert.layouts.loading import vllm_advice
from tests.conftest import Build
from tests.program import refused, succeeded
from tests.stock import adapted, logits, tensors, trained_from


@pytest.fixture
def trained(checkpoint: Build, decomposed: Build, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter that something trained, and the decomposed directory that it started from."""
    out = decomposed(checkpoint("llama", dtype=torch.float32))
    return trained_from(out, tmp_path / "trained"), out


def products(directory: Path) -> dict[str, Tensor]:
    """B @ A of every module, in float64."""
    pieces = tensors(directory)
    names = [name.removesuffix(".lora_A.weight") for name in pieces if name.endswith(".lora_A.weight")]
    return {
        name: pieces[f"{name}.lora_B.weight"].double() @ pieces[f"{name}.lora_A.weight"].double()
        for name in names
    }


def module(name: str) -> str:
    return name.removeprefix("base_model.model.")


@pytest.mark.parametrize("asked", [{"rank": 3}, {"tol": 0.3}, {"rank_budget": 40}], ids=str)
def test_the_loss_is_the_least_and_is_recorded(
    asked: dict[str, Any], trained: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, residual = trained
    to_lora(adapter, tmp_path / "whole", residual=str(residual))
    manifest = to_lora(adapter, tmp_path / "lora", LoraOptions(**asked), residual=str(residual))
    note = manifest.result.truncation
    whole, kept = products(tmp_path / "whole"), products(tmp_path / "lora")
    lost, norm = 0.0, 0.0
    for name, product in whole.items():
        row = note.modules[module(name)]
        sigma = torch.linalg.svdvals(product)
        least = float(sigma[row.rank :].norm() / sigma.norm())
        assert row.error == pytest.approx(least, abs=1e-6)
        found = float((product - kept[name]).norm() / product.norm())
        assert found == pytest.approx(row.error, abs=1e-5)
        lost, norm = lost + float((product - kept[name]).square().sum()), norm + float(product.square().sum())
    assert note.error == pytest.approx((lost / norm) ** 0.5, abs=1e-5)
    ranks = [row.rank for row in note.modules.values()]
    assert manifest.result.rank == max(ranks)
    if "rank" in asked:
        assert set(ranks) == {3}
    elif "tol" in asked:
        assert all(row.error <= 0.3 for row in note.modules.values()) and min(ranks) < 8
    else:
        assert sum(ranks) == 40 and len(set(ranks)) > 1, "the budget was not shared out"


def test_stock_peft_reads_a_lora_of_many_ranks(
    trained: tuple[Path, Path], checkpoint: Build, tmp_path: Path
) -> None:
    adapter, residual = trained
    base = checkpoint("llama", dtype=torch.float32)
    to_lora(adapter, tmp_path / "whole", residual=str(residual))
    to_lora(adapter, tmp_path / "lora", LoraOptions(tol=1e-6), residual=str(residual))
    wanted = logits(adapted(base, tmp_path / "whole"))
    assert torch.allclose(logits(adapted(base, tmp_path / "lora")), wanted, atol=3e-5)


def test_without_a_limit_nothing_is_lost_and_nothing_is_said(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, residual = trained
    assert (
        "truncation"
        not in to_lora(adapter, tmp_path / "whole", LoraOptions(), residual=str(residual)).options
    )


def test_a_change_of_nothing_has_a_lora_of_zeros(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    out = decomposed(checkpoint("llama", dtype=torch.float32))
    for number, asked in enumerate(({"rank": 2}, {"tol": 0.1}, {"rank_budget": 9})):
        found = to_lora(out, tmp_path / str(number), LoraOptions(**asked))
        assert found.result.truncation.error < 1e-6


def test_the_limits_exclude_each_other(trained: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`rank` and `tol` exclude each other: give one"):
        options(LoraOptions, Recipe(), {"rank": 2, "tol": 0.1})
    adapter, residual = trained
    command = ("to-lora", adapter, "-o", tmp_path / "lora", "--residual", residual)
    refused(
        *command, "--tol", "0.1", "--rank-budget", "5", words=["--tol and --rank-budget exclude each other"]
    )
    said = succeeded(*command, "--rank-budget", "30")
    ranks = json.loads((tmp_path / "lora" / "svdconvert.json").read_text())["result"]["truncation"]["modules"]
    least, most = (pick(module["rank"] for module in ranks.values()) for pick in (min, max))
    assert least < most
    assert f"rank {most} ({least} to {most} by matrix)" in said.out


def test_a_wrong_option_is_named_as_it_is_typed(trained: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, residual = trained
    command = ("to-lora", adapter, "-o", tmp_path / "lora", "--residual", residual)
    refused(*command, "--rank-budget", "0", words=["to-lora: --rank-budget is 0: it should be greater"])


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 1e-4), ("float16", 1e-5)])
def test_rounding_the_factors_is_measured(
    dtype: str, least: float, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, residual = trained
    whole = to_lora(adapter, tmp_path / "whole", residual=str(residual)).result
    ended = succeeded("to-lora", adapter, "-o", tmp_path / "half", "--residual", residual, "--dtype", dtype)
    written = json.loads((tmp_path / "half" / "svdconvert.json").read_text())["result"]
    exact, kept = products(tmp_path / "whole"), products(tmp_path / "half")
    lost = sum(float((exact[name] - kept[name]).square().sum()) for name in exact) ** 0.5
    norm = sum(float(product.square().sum()) for product in exact.values()) ** 0.5
    assert written["rounding"] == pytest.approx(lost / norm, rel=1e-3) and written["rounding"] > least
    assert written["norm"] == pytest.approx(norm)
    assert (whole.rounding, whole.norm) == (0.0, pytest.approx(norm))
    assert "rounding error" in ended.out and "exact" not in ended.out


def test_a_lora_that_changes_nothing_is_reported(
    checkpoint: Build, decomposed: Build, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    untrained = decomposed(checkpoint("llama"))
    assert "changes nothing" in succeeded("to-lora", untrained, "-o", tmp_path / "zero").err
    adapter, residual = trained
    words = ["-o", tmp_path / "lora", "--residual", residual]
    assert "changes nothing" not in succeeded("to-lora", adapter, *words).err


def test_a_lora_keeps_the_repository_of_a_base_that_the_adapter_names(
    checkpoint: Build, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, residual = trained
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "org/name", "auto_mapping": None})
    )
    ended = succeeded("to-lora", adapter, "-o", tmp_path / "plain", "--init", "none")
    assert (
        json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "org/name"
    )
    assert "--base org/name" in " ".join(ended.out.split())
    # Here the adapter's base is the residual, which is not the base of the LoRA.
    succeeded("to-lora", adapter, "-o", tmp_path / "converted", "--residual", residual)
    found = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert found["base_model_name_or_path"] is None


@pytest.mark.parametrize(
    ("rank", "advice"),
    [(16, None), (17, "--max-lora-rank 32"), (257, "--max-lora-rank 320"), (513, "up to 512")],
)
def test_what_vllm_must_be_told_depends_on_the_rank(rank: int, advice: str | None) -> None:
    found = vllm_advice(rank)
    assert found is None if advice is None else advice in str(found)
