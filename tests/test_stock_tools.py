"""Stock transformers and PEFT load what is written, and compute the same with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

from svdconvert.commands.decompose import decompose
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.errors import ArtifactError
from svdconvert.pipeline.decompose import SplitOptions
from svdconvert.pipeline.merge import MergeOptions
from svdconvert.pipeline.to_lora import LoraOptions
from tests.inputs.test_init_evidence import without_marks
from tests.stock import TOKENS, WEIGHTS, adapted, logits, plain, same_bytes, tensors, trained_from
from tests.tiny import PEFT_MODEL_TYPES, SHARDED, layout_of

Build = Callable[..., Path]
every_family = pytest.mark.parametrize("family", PEFT_MODEL_TYPES)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - wanted).abs().max() < tolerance * max(1.0, float(wanted.abs().max())))


def holds(model: torch.nn.Module, directory: Path, family: str) -> bool:
    """True if a model's parameters are the tensors of a directory, in the stored dtype."""
    layout = layout_of(directory)
    loaded = dict(model.named_modules())
    stored = tensors(directory)
    pairs = [
        (loaded[slot.module].weight, stored[name])
        for name in stored
        if (slot := layout.slot(name)) and not slot.role.startswith("vision")
    ]
    assert pairs
    return all(mine.dtype == its.dtype and torch.equal(mine, its) for mine, its in pairs)


@every_family
@pytest.mark.parametrize("residual_dtype", ["auto", "float32", "float16"])
def test_a_bare_from_pretrained_gives_what_the_files_hold(
    family: str, residual_dtype: str, checkpoint: Build, decomposed: Build
) -> None:
    out = decomposed(checkpoint(family), residual_dtype=residual_dtype)
    # transformers loads all tensors in one dtype: float16 and bfloat16 both fit into float32 only.
    if residual_dtype != "float16":
        assert holds(plain(out), out, family)
    named = json.loads((out / "config.json").read_text())
    assert named["dtype"] == {"auto": "bfloat16", "float32": "float32", "float16": "float32"}[residual_dtype]


@every_family
@pytest.mark.parametrize("targets", ["all-linear", "attn", "*.layer*.1.*"])
def test_the_residual_and_its_initial_adapter_give_the_logits_of_the_base(
    family: str, targets: str, checkpoint: Build, decomposed: Build
) -> None:
    base = checkpoint(family, dtype=torch.float32)
    out = decomposed(base, targets=(targets,), alpha=3.0)
    wanted = logits(plain(base))
    assert not close(logits(plain(out)), wanted, 0.01), "the residual alone is as good as the base"
    assert close(logits(adapted(out, out, subfolder="pissa_init")), wanted)


@every_family
def test_a_bfloat16_residual_and_its_initial_adapter_are_near_the_base(
    family: str, checkpoint: Build, decomposed: Build
) -> None:
    base = checkpoint(family)
    out = decomposed(base)
    difference = logits(adapted(out, out, subfolder="pissa_init")) - logits(plain(base))
    assert difference.abs().mean() < 0.05 * logits(plain(base)).std()


def trained(model: PeftModel, out: Path) -> Path:
    """Two steps of a plain training loop."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    model.save_pretrained(out)
    return out


@every_family
@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_what_peft_trained_from_the_initial_adapter_is_converted_and_merged(
    family: str, method: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=torch.float32)
    out = decomposed(base, method=method)
    model = adapted(out if method == "pissa" else base, out, subfolder=f"{method}_init", trainable=True)
    adapter = trained(model, tmp_path / "adapter")
    wanted = logits(model)
    assert not close(wanted, logits(plain(base)), 1e-3), "training changed nothing"
    manifest = to_lora(adapter, tmp_path / "lora", residual=str(out))
    merge(adapter, tmp_path / "merged", residual=str(out))
    assert manifest.result.rank == (8 if method == "pissa" else 4)
    assert close(logits(adapted(base, tmp_path / "lora")), wanted, 3e-5)
    assert close(logits(plain(tmp_path / "merged")), wanted, 3e-5)
    with safe_open(tmp_path / "lora" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_adapter_that_names_its_residual_needs_no_option(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    out = decomposed(checkpoint("llama", dtype=torch.float32))
    model = adapted(out, out, subfolder="pissa_init", trainable=True)
    adapter = trained(model, tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(out)
    merge(adapter, tmp_path / "merged")
    assert close(logits(plain(tmp_path / "merged")), logits(model), 3e-5)


SETTINGS: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": {"layers.1.self_attn.q_proj": 7, "up_proj": 2}},
    "scales": {"alpha_pattern": {"up_proj": 9}, "use_rslora": True},
    "regex": {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    "one layer": {"layers_to_transform": [0]},
    "all but": {"exclude_modules": ["layers.0.mlp.up_proj"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_any_lora_of_peft_becomes_one_of_scale_one_and_merges(
    name: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint("qwen2", dtype=torch.float32)
    values = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]} | SETTINGS[name]
    model = get_peft_model(plain(base), LoraConfig(**values, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    to_lora(tmp_path / "adapter", tmp_path / "lora")
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert close(logits(adapted(base, tmp_path / "lora")), logits(model))
    assert close(logits(plain(tmp_path / "merged")), logits(model))


def test_an_adapter_that_does_not_say_where_it_started_is_refused(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    initial = decomposed(checkpoint("llama")) / "pissa_init"
    marked = shutil.copytree(initial, tmp_path / "marked")
    for init in (None, "none"):
        with pytest.raises(ArtifactError, match="its initial state is unknown.*--residual"):
            to_lora(marked, tmp_path / "lora", init=init)
    lost = without_marks(initial, tmp_path / "lost")
    with pytest.raises(ArtifactError, match="does not record its initial state.*--residual.*--init none"):
        to_lora(lost, tmp_path / "lora")
    to_lora(lost, tmp_path / "lora", init="none")
    assert same_bytes(tensors(tmp_path / "lora"), tensors(lost))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lora_may_be_stored_in_half_precision(
    dtype: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    out = decomposed(checkpoint("llama", dtype=torch.float32))
    adapter = trained_from(out, tmp_path / "trained")
    to_lora(adapter, tmp_path / "half", LoraOptions(dtype=dtype), residual=str(out))
    to_lora(adapter, tmp_path / "wide", residual=str(out))
    half, wide = tensors(tmp_path / "half"), tensors(tmp_path / "wide")
    assert half.keys() == wide.keys()
    assert all(torch.equal(half[name], wide[name].to(getattr(torch, dtype))) for name in wide)


def test_multimodal_gemma_is_adapted_under_its_names_at_run_time(
    checkpoint: Build, decomposed: Build
) -> None:
    base = checkpoint("gemma3", dtype=torch.float32)
    out = decomposed(base)
    model = Gemma3ForConditionalGeneration.from_pretrained(out)
    initial = PeftModel.from_pretrained(model, out, subfolder="pissa_init")
    layers = [path for path, layer in initial.named_modules() if hasattr(layer, "lora_A")]
    assert len(layers) == 14
    assert all("model.language_model.layers" in path for path in layers)
    assert close(logits(initial), logits(Gemma3ForConditionalGeneration.from_pretrained(base)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_heads_stay_tied_or_untied(
    family: str, tied: bool, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, tied=tied, dtype=torch.float32)
    out = decomposed(base)
    merge(out, tmp_path / "merged", MergeOptions(side="residual"))
    for directory in (out, tmp_path / "merged"):
        assert ("lm_head.weight" in tensors(directory)) == (not tied)
        model = plain(directory)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert close(logits(adapted(out, out, subfolder="pissa_init")), logits(plain(base)))
    assert close(logits(plain(tmp_path / "merged")), logits(plain(base)))


@pytest.mark.parametrize("shard", ["5GB", SHARDED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bin_sources_become_the_same_safetensors(
    dtype: torch.dtype, shard: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    pickled = checkpoint("qwen2", dtype=dtype, shard=shard, pickled=True)
    decompose(pickled, tmp_path / "out", SplitOptions(rank=4))
    merge(tmp_path / "out", tmp_path / "merged")
    wanted, found = tensors(decomposed(checkpoint("qwen2", dtype=dtype))), tensors(tmp_path / "out")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    before = tensors(checkpoint("qwen2", dtype=dtype))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(tmp_path / "merged").items())
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert holds(plain(tmp_path / "merged"), tmp_path / "merged", "qwen2")


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_matrices_that_share_memory_in_a_bin_file_become_separate_tensors(
    method: str, checkpoint: Build, tmp_path: Path
) -> None:
    shared = shutil.copytree(checkpoint("llama", dtype=torch.float32, pickled=True), tmp_path / "shared")
    weights = torch.load(shared / "pytorch_model.bin")
    for name in [name for name in weights if "layers.1.mlp" in name]:
        weights[name] = weights[name.replace("layers.1", "layers.0")]
    torch.save(weights, shared / "pytorch_model.bin")
    decompose(shared, tmp_path / "out", SplitOptions(rank=4, method=method))
    merge(
        tmp_path / "out", tmp_path / "merged", MergeOptions(side="base" if method == "lora" else "residual")
    )
    for name, tensor in tensors(tmp_path / "merged").items():
        assert torch.allclose(tensor, weights[name], atol=1e-6), name


@pytest.mark.parametrize("limit", ["9KB", "1MB"])
def test_shards_of_any_size_load(limit: str, checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    decompose(base, tmp_path / "out", SplitOptions(rank=4, max_shard_size=limit))
    merge(tmp_path / "out", tmp_path / "merged", MergeOptions(max_shard_size=limit))
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (limit == "9KB")
    assert holds(plain(tmp_path / "out"), tmp_path / "out", "llama")
    assert torch.equal(logits(plain(tmp_path / "merged")), logits(plain(base)))


def test_tensors_are_stored_by_element_size_and_then_as_in_the_source(
    checkpoint: Build, decomposed: Build
) -> None:
    base = checkpoint("llama")
    out = decomposed(base, residual_dtype="float32", targets=("mlp",))
    with safe_open(base / "model.safetensors", "pt") as file:
        order = list(file.offset_keys())
    with safe_open(out / "model.safetensors", "pt") as file:
        found = list(file.offset_keys())
        assert file.metadata() == {"format": "pt"}
    assert found == [name for name in order if ".mlp." in name] + [
        name for name in order if ".mlp." not in name
    ]
