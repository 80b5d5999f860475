"""An adapter's modules are found in the model under every spelling, and what is not supported is named."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdconvert import MergeOptions, Run, merge
from svdconvert.adapters.adapter_config import CONFIG, AdapterConfig
from svdconvert.adapters.peft_files import PREFIX, WEIGHTS, key
from svdconvert.layouts.base import LAYOUTS
from tests.conftest import Build
from tests.program import refused, succeeded
from tests.stock import tensors

RANK = 2


def factors(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Random factors for modules of these shapes, under PEFT's names."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for module, (rows, columns) in shapes.items():
        found[key(module, "lora_A")] = torch.randn(RANK, columns, generator=generator)
        found[key(module, "lora_B")] = torch.randn(rows, RANK, generator=generator)
    return found


def write_adapter(directory: Path, stored: Mapping[str, Tensor], **settings: Any) -> Path:
    directory.mkdir()
    config = AdapterConfig(**{"rank": RANK, "alpha": RANK, "targets": ["q_proj"], **settings})
    (directory / CONFIG).write_text(config.text())
    save_file(
        {name: one.clone() for name, one in stored.items()}, directory / WEIGHTS, metadata={"format": "pt"}
    )
    return directory


def merged(adapter: Path, base: Path, out: Path) -> dict[str, Tensor]:
    merge(adapter, out, MergeOptions(dtype="float32"), Run(device="cpu"), base=str(base), init="none")
    return tensors(out)


@pytest.mark.parametrize(
    ("family", "module", "tensor"),
    [
        ("llama", "lm_head", "lm_head.weight"),
        ("qwen3_moe", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.gate.weight"),
        (
            "gemma3",
            "model.vision_tower.encoder.layers.0.mlp.fc1",
            "vision_tower.encoder.layers.0.mlp.fc1.weight",
        ),
        (
            "gemma3",
            "language_model.model.layers.1.self_attn.q_proj",
            "language_model.model.layers.1.self_attn.q_proj.weight",
        ),
        ("gemma3", "model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj.weight"),
        ("llama", "layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_linear_layer_is_merged_whatever_its_place_and_spelling(
    family: str, module: str, tensor: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=torch.float32)
    before = tensors(base)
    added = factors({module: before[tensor].shape})
    after = merged(write_adapter(tmp_path / "adapter", added), base, tmp_path / "out")
    wanted = before[tensor] + added[key(module, "lora_B")] @ added[key(module, "lora_A")]
    torch.testing.assert_close(after.pop(tensor), wanted)
    assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PREFIX, f"_orig_mod.{PREFIX}"),
        (PREFIX, f"module.{PREFIX}"),
        (PREFIX, f"{PREFIX}_orig_mod."),
        (".weight", ".default.weight"),
    ],
)
def test_what_wrappers_add_to_the_names_of_an_adapter_is_ignored(
    old: str, new: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    added = factors({"model.layers.0.self_attn.q_proj": (32, 32)})
    plain = write_adapter(tmp_path / "plain", added)
    renamed = {name.replace(old, new): tensor for name, tensor in added.items()}
    wrapped = write_adapter(tmp_path / "wrapped", renamed)
    wanted = merged(plain, base, tmp_path / "one")
    found = merged(wrapped, base, tmp_path / "two")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    succeeded("to-lora", wrapped, "-o", tmp_path / "lora", "--base", base)
    assert load_file(tmp_path / "lora" / WEIGHTS).keys() == added.keys()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_the_prefix_of_a_wrapper_in_a_checkpoint_is_named(
    prefix: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(checkpoint("llama"), tmp_path / "base"))
    stored = {prefix + name: tensor for name, tensor in tensors(base).items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    refused("decompose", base, "-o", tmp_path / "out", words=[f"the prefix {prefix}", "rename its tensors"])
    assert f"the prefix {prefix}" in " ".join(succeeded("inspect", base).out.split())


def test_two_adapters_of_one_tensor_are_refused(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    shape = (32, 32)
    names = {"model.layers.0.self_attn.q_proj": shape, "layers.0.self_attn.q_proj": shape}
    adapter = write_adapter(tmp_path / "adapter", factors(names))
    refused("merge", adapter, "-o", tmp_path / "out", "--base", base, words=["two adapters of", "remove one"])


Q_PROJ = {"model.layers.0.self_attn.q_proj": (32, 32)}
HEAD = torch.ones(65, 32)

UNSUPPORTED: dict[str, tuple[dict[str, Tensor], dict[str, Any], list[str]]] = {
    "trained tokens": (
        {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 32)},
        {},
        ["single trained rows of an embedding", "not supported"],
    ),
    "a resized head": (
        {f"{PREFIX}lm_head.weight": HEAD, f"{PREFIX}lm_head.modules_to_save.weight": HEAD},
        {"modules_to_save": ["lm_head"]},
        ["another vocabulary", "lm_head.weight would have 65 rows", "resize the model"],
    ),
    "a head of its own": (
        {f"{PREFIX}score.weight": torch.ones(3, 32)},
        {"modules_to_save": ["score"]},
        ["trained score.weight", "a head of a known task", "PEFT"],
    ),
    "two values of one weight": (
        {f"{PREFIX}lm_head.weight": HEAD, f"{PREFIX}lm_head.modules_to_save.weight": HEAD + 1},
        {"modules_to_save": ["lm_head"]},
        ["mean the same and differ"],
    ),
    "another base": (
        {**factors({"lm_head": (61, 32)}), f"{PREFIX}lm_head.base_layer.weight": torch.ones(61, 32)},
        {},
        ["has its own", "lm_head.base_layer.weight", "another model", "--base"],
    ),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_merge_does_not_support_is_named(what: str, checkpoint: Build, tmp_path: Path) -> None:
    stored, settings, words = UNSUPPORTED[what]
    adapter = write_adapter(tmp_path / "adapter", {**factors(Q_PROJ), **stored}, **settings)
    base = checkpoint("llama", dtype=torch.float32, tied=False)
    refused("merge", adapter, "-o", tmp_path / "out", "--base", base, words=[adapter, *words])
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_head_that_peft_stored_changes_nothing(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama", dtype=torch.float32, tied=False)
    added = factors({"lm_head": (61, 32)})
    copy = {f"{PREFIX}lm_head.base_layer.weight": tensors(base)["lm_head.weight"]}
    without = merged(write_adapter(tmp_path / "without", added), base, tmp_path / "one")
    found = merged(write_adapter(tmp_path / "with", {**added, **copy}), base, tmp_path / "two")
    assert all(torch.equal(found[name], without[name]) for name in without)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "mixtral", "gemma2"])
def test_a_body_saved_without_its_head_is_decomposed_and_merged(
    family: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(checkpoint(family), tmp_path / "base"))
    stored = tensors(base)
    stored.pop("lm_head.weight", None)
    body = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    save_file(body, base / "model.safetensors", metadata={"format": "pt"})
    succeeded("decompose", base, "-o", tmp_path / "split", "--rank", 4)
    config = json.loads((tmp_path / "split" / "pissa_init" / CONFIG).read_text())
    assert config["task_type"] is None  # the body cannot generate, and PEFT refuses CAUSAL_LM for it
    succeeded("merge", tmp_path / "split", "-o", tmp_path / "merged")
    assert all(torch.equal(tensor, body[name]) for name, tensor in tensors(tmp_path / "merged").items())


def test_an_encoder_with_a_head_has_the_task_of_its_layout() -> None:
    layout = LAYOUTS.get("llama")
    assert layout.task_of(["model.layers.0.self_attn.q_proj.weight"]) == "CAUSAL_LM"
    assert LAYOUTS.get("bert").task_of(["bert.encoder.layer.0.output.dense.weight"]) is None
