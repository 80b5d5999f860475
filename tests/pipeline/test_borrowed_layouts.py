"""A layout that is given for other models says which matrices it leaves out, and may lack a kind of block."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdconvert import Run, SplitOptions, decompose
from svdconvert.commands.decompose import plan_decompose
from tests.conftest import Build


def edited(
    source: Path, target: Path, model_type: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Path:
    """A copy with another model type and other tensors."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return target


def hybrid(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0.self_attn" not in name}
    return kept | {"model.layers.0.linear_attn.in_proj.weight": torch.randn(96, 32)}


def only_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.0.mlp.")}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.1.mlp.")}
    return kept | {name.replace(".0.", ".1.", 1): tensor.clone() for name, tensor in first.items()}


def test_matrices_without_a_role_are_named(checkpoint: Build, tmp_path: Path) -> None:
    model = edited(checkpoint("llama"), tmp_path / "hybrid", "qwen3_next", hybrid)
    options = SplitOptions(rank=4, layout="qwen")
    said: list[str] = []
    decompose(model, tmp_path / "out", options, Run(notify=said.append))
    for remarks in (said, plan_decompose(model, options).remarks):
        assert any("model.layers.*.linear_attn.in_proj.weight" in remark for remark in remarks)
        assert not any("embed_tokens" in remark or "self_attn" in remark for remark in remarks)


@pytest.mark.parametrize(("family", "layout"), [("llama", "llama"), ("qwen3_moe", "qwen-moe")])
def test_a_models_own_layout_leaves_nothing_out_that_is_worth_a_word(
    checkpoint: Build, family: str, layout: str
) -> None:
    assert plan_decompose(checkpoint(family), SplitOptions(rank=4, layout=layout)).remarks == ()


def test_a_mixture_without_a_dense_layer_fits_the_layout_of_mixtures(
    checkpoint: Build, tmp_path: Path
) -> None:
    model = edited(checkpoint("qwen3_moe"), tmp_path / "mixture", "other_moe", only_experts)
    plan = plan_decompose(model, SplitOptions(rank=4, layout="qwen-moe"))
    assert {row.role for row in plan.rows} >= {"experts.gate", "experts.up", "experts.down", "attn.q"}
    assert any("model.layers.*.mlp.gate.weight" in remark for remark in plan.remarks)
