"""Parameters that are trained in full next to the factors (norms, biases, heads) are kept, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from svdconvert.adapters.extra_parameters import declaration, extra_key, is_declared, parameter_of
from svdconvert.adapters.peft_files import open_adapter
from svdconvert.commands.decompose import decompose
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.commands.train import train
from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.pipeline.decompose import SplitOptions
from tests.reading import readable, write_sums
from tests.stock import adapted, logits, plain, tensors
from tests.tiny import build

Build = Callable[..., Path]
PLAN: dict[str, Any] = {"steps": 3, "batch_size": 2, "max_length": 48, "lr": 1e-2, "device": "cpu"}

KINDS: dict[str, dict[str, Any]] = {
    "norms": {"modules_to_save": ["model.norm", "input_layernorm"]},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "a head": {"modules_to_save": ["lm_head"]},
    "all of it": {"bias": "all", "modules_to_save": ["norm", "lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trained_in_full_is_merged_and_kept_in_the_lora(
    kind: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint("qwen2", dtype=torch.float32, tied=False)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **KINDS[kind]
    )
    model = get_peft_model(plain(base), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits(model)
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    to_lora(tmp_path / "adapter", tmp_path / "lora", init="none")
    merge(tmp_path / "lora", tmp_path / "again", base=str(base))
    assert (logits(plain(tmp_path / "merged")) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (logits(adapted(base, tmp_path / "lora")) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (logits(plain(tmp_path / "again")) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_parameters_trained_in_full_are_the_same_for_peft_merge_and_to_lora(tmp_path: Path) -> None:
    base = readable(build("qwen2", tmp_path / "tiny", dtype=torch.float32, tied=False), tmp_path / "base")
    decompose(base, tmp_path / "start", SplitOptions(rank=4, targets=("attn.q", "mlp")))
    wanted = ("norms", "biases", "lm_head.weight")
    plan = TrainOptions(
        data=str(write_sums(tmp_path / "sums.jsonl")), train_also=wanted, precision="fp32", **PLAN
    )
    train(tmp_path / "start", tmp_path / "trained", plan)
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert config["bias"] == "all" and "model.layers.1.input_layernorm" in config["modules_to_save"]
    merge(tmp_path / "trained", tmp_path / "merged")
    to_lora(tmp_path / "trained", tmp_path / "lora")
    before, after = tensors(base), tensors(tmp_path / "merged")
    unchanged = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert unchanged == {"model.embed_tokens.weight"} | {
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "kvo"
    }
    found = logits(plain(tmp_path / "merged"))
    trained = logits(adapted(tmp_path / "start", tmp_path / "trained"))
    assert (trained - found).abs().max() < 1e-5 * found.abs().max()
    assert (logits(adapted(base, tmp_path / "lora")) - found).abs().max() < 1e-5 * found.abs().max()


def test_small_steps_of_a_norm_are_not_lost_to_the_rounding_of_bfloat16(tmp_path: Path) -> None:
    base = readable(build("llama", tmp_path / "tiny"), tmp_path / "base")
    plan = TrainOptions(
        data=str(write_sums(tmp_path / "sums.jsonl")),
        train_also=("norms",),
        precision="bf16",
        **(PLAN | {"lr": 1e-5}),
    )
    train(base, tmp_path / "trained", plan, split=SplitOptions(rank=4))
    extra = open_adapter(tmp_path / "trained").extras["model.norm.weight"]
    moved = tensors(tmp_path / "trained")[extra] - tensors(base)["model.norm.weight"].float()
    assert 0 < moved.abs().max() < 1e-4
    assert (moved != 0).float().mean() > 0.9


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": (("nroms",), "'nroms', which matches no tensor; give norms, biases"),
    "an adapted matrix": (("*.q_proj.weight",), "q_proj.weight, which the adapter trains already"),
    "tied embeddings": (("model.embed_tokens.weight",), "also the head's weight"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_trained_in_full_is_refused(fault: str, tmp_path: Path) -> None:
    base = readable(build("llama", tmp_path / "tiny", tied=True), tmp_path / "base")
    wanted, words = REFUSED[fault]
    plan = TrainOptions(data=str(write_sums(tmp_path / "sums.jsonl")), train_also=wanted, **PLAN)
    with pytest.raises(RecipeError, match=words):
        train(base, tmp_path / "trained", plan, split=SplitOptions(rank=4))
    assert not (tmp_path / "trained").exists()


def test_names_in_the_adapter_and_in_the_base_map_to_each_other() -> None:
    adapted_modules = {"model.layers.0.self_attn.q_proj"}
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"):
        assert parameter_of(extra_key(name, adapted_modules)) == name
    assert declaration(["a.norm.weight", "a.q.bias"], {"a.q"}) == (["a.norm"], "lora_only")
    assert declaration(["a.k.bias"], {"a.q"}) == ([], "all")
    assert declaration(["a.ln.weight", "a.ln.bias"], set()) == (["a.ln"], "none")
    assert is_declared("base_model.model.a.norm.weight", ["norm"], "none")
    assert not is_declared("base_model.model.a.norm2.weight", ["norm"], "all")
    assert not is_declared("base_model.model.a.q.lora_embedding_A", ["a"], "all")
