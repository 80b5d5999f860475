"""Adapters of other types than LoRA, as PEFT saves them, against what PEFT merges."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file

from svdconvert import CombineOptions, LoraOptions, MergeOptions, Run, combine, inspect, merge, to_lora
from svdconvert.errors import ArtifactError, RecipeError
from tests.conftest import Build
from tests.stock import logits, plain, tensors

RUN = Run(threads=1)
TARGETS = ["q_proj", "down_proj", "up_proj"]
WEIGHTS = "adapter_model.safetensors"

TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1}),
    "vera": ("VeraConfig", {"r": 4}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}),
    "loha of a high rank": ("LoHaConfig", {"r": 7, "alpha": 3}),
    "loha with patterns": (
        "LoHaConfig",
        {"r": 2, "alpha": 3, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 5}},
    ),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "lokr with a full factor": ("LoKrConfig", {"r": 64, "alpha": 3}),
    "lokr with four factors": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True}),
    "miss": ("MissConfig", {"r": 5}),
    "miss that divides": ("MissConfig", {"r": 4}),
    "mini miss": ("MissConfig", {"r": 4, "mini_r": 4, "init_weights": "mini"}),
    "mica": ("LoraConfig", {"r": 3, "init_lora_weights": "mica"}),
    "kasa": ("LoraConfig", {"r": 3, "lora_alpha": 5, "kasa_config": KasaConfig()}),
    "dora": ("LoraConfig", {"r": 3, "use_dora": True}),
    "dora with rslora": ("LoraConfig", {"r": 3, "use_dora": True, "use_rslora": True, "lora_alpha": 4}),
}
LORAS = [name for name in TYPES if not name.startswith("dora")]
"""Those that equal a LoRA."""


@pytest.fixture(scope="module")
def base(checkpoint: Build) -> Path:
    return checkpoint("llama", dtype=torch.float32, tied=False)


def adapter_of(base: Path, out: Path, name: str) -> Path:
    """An adapter of a type, as if trained: every value of its file has changed."""
    config, options = TYPES[name]
    made = getattr(peft, config)(task_type="CAUSAL_LM", target_modules=TARGETS, **options)
    get_peft_model(plain(base), made).save_pretrained(out)
    random = torch.Generator().manual_seed(3)
    values = load_file(out / WEIGHTS)
    changed = {
        key: value
        if key.startswith("base_model.vera_")
        else value + 0.1 * torch.randn(value.shape, generator=random)
        for key, value in values.items()
    }
    save_file(changed, out / WEIGHTS, metadata={"format": "pt"})
    return out


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(plain(base), adapter)
    return {name: value.detach() for name, value in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("name", TYPES)
def test_a_merge_is_that_of_peft(name: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", name)
    merge(adapter, tmp_path / "out", run=RUN, base=str(base))
    expected = merged_by_peft(base, adapter)
    start = tensors(base)
    for key, value in tensors(tmp_path / "out").items():
        change = torch.linalg.norm(expected[key] - start[key])
        rounding = 1e-6 * torch.linalg.norm(start[key])  # of PEFT's own SVD of the whole matrix, for KaSA
        assert torch.linalg.norm(value - expected[key]) <= 1e-5 * change + rounding, key


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_is_exact_in_stock_peft(name: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", name)
    to_lora(adapter, tmp_path / "lora", run=RUN)  # its configuration names the base
    model = PeftModel.from_pretrained(plain(base), tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    expected = plain(base)
    expected.load_state_dict(merged_by_peft(base, adapter))
    assert torch.allclose(logits(model), logits(expected), atol=2e-5)


def test_an_adalora_with_fewer_ranks_keeps_its_first_scale(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", "adalora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    values = load_file(adapter / WEIGHTS)
    kept = [True, False, True, False]
    config["rank_pattern"] = {}
    for key in [key for key in values if "q_proj" in key]:
        axis = 1 if key.endswith("lora_B") else 0
        values[key] = values[key].index_select(axis, torch.tensor([0, 2])).contiguous()
        if key.endswith("lora_E"):
            config["rank_pattern"][key.removeprefix("base_model.model.")] = kept
    save_file(values, adapter / WEIGHTS, metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge(adapter, tmp_path / "out", run=RUN, base=str(base))
    with pytest.warns(RuntimeWarning, match="rank_pattern keys"):
        expected = merged_by_peft(base, adapter)
    for key, value in tensors(tmp_path / "out").items():
        assert torch.allclose(value, expected[key], atol=1e-6), key


def test_a_module_without_ranks_changes_nothing(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", "adalora")
    values = load_file(adapter / WEIGHTS)
    for key in [key for key in values if "q_proj" in key]:
        axis = 1 if key.endswith("lora_B") else 0
        values[key] = values[key].narrow(axis, 0, 0).contiguous()
    save_file(values, adapter / WEIGHTS, metadata={"format": "pt"})
    merge(adapter, tmp_path / "out", run=RUN, base=str(base))
    start, found = tensors(base), tensors(tmp_path / "out")
    changed = {key for key, value in start.items() if not torch.equal(value, found[key])}
    assert changed == {key for key in start if any(part in key for part in ("up_proj", "down_proj"))}


def test_factors_of_an_absurd_size_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", "lokr")
    part = "base_model.model.model.layers.0.mlp.up_proj.lokr"
    values = {f"{part}_w1": torch.ones(200_000, 1), f"{part}_w2": torch.ones(200_000, 1)}
    save_file(values, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="do not fit together"):
        to_lora(adapter, tmp_path / "out", run=RUN)


def test_adapters_of_several_types_are_combined(base: Path, tmp_path: Path) -> None:
    chosen = [adapter_of(base, tmp_path / name, name) for name in ("loha", "lokr", "miss", "kasa")]
    combine(chosen, tmp_path / "out", CombineOptions(weights=(1, 1, 1, 1)), RUN)
    model = PeftModel.from_pretrained(plain(base), tmp_path / "out").merge_and_unload().state_dict()
    start = tensors(base)
    each = [merged_by_peft(base, path) for path in chosen]
    for key, value in start.items():
        expected = value + sum(one[key] - value for one in each)
        assert torch.allclose(model[key], expected, atol=2e-5), key


def test_what_cannot_be_read_is_refused(base: Path, tmp_path: Path) -> None:
    vera = adapter_of(base, tmp_path / "vera", "vera")
    values = load_file(vera / WEIGHTS)
    save_file({key: value for key, value in values.items() if key != "base_model.vera_A"}, vera / WEIGHTS)
    with pytest.raises(ArtifactError, match="save_projection=True"):
        merge(vera, tmp_path / "out", run=RUN, base=str(base))
    miss = adapter_of(base, tmp_path / "miss", "miss")
    config = json.loads((miss / "adapter_config.json").read_text())
    for changes, message in (
        ({"base_model_name_or_path": "/absent"}, "does not store the shapes.*--base"),
        ({"init_weights": "bat"}, "of the kind bat"),
        ({"r": 0}, "r 0, which must be"),
    ):
        (miss / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ArtifactError, match=message):
            to_lora(miss, tmp_path / "out", run=RUN)
    loha = adapter_of(base, tmp_path / "loha", "loha")
    values = load_file(loha / WEIGHTS)
    first = next(key for key in values if key.endswith("hada_w1_b"))
    for changed, message in (
        ({first: torch.zeros(3, 4)}, "do not fit together"),
        ({first: torch.zeros(2)}, "do not fit together"),
        ({"base_model.model.model.norm.weight": torch.zeros(2)}, "which its type does not have"),
    ):
        save_file(values | changed, loha / WEIGHTS)
        with pytest.raises(ArtifactError, match=message):
            to_lora(loha, tmp_path / "out", run=RUN)
    assert not (tmp_path / "out").exists()


def test_a_dora_has_no_exact_lora(base: Path, tmp_path: Path) -> None:
    dora = adapter_of(base, tmp_path / "dora", "dora")
    with pytest.raises(RecipeError, match="give its rank with --rank"):
        to_lora(dora, tmp_path / "out", run=RUN)
    with pytest.raises(ArtifactError, match="no LoRA can express exactly"):
        combine([dora, dora], tmp_path / "out", run=RUN, base=str(base))
    manifest = merge(dora, tmp_path / "out", MergeOptions(dtype="bfloat16"), RUN, base=str(base))
    assert 0.99 < manifest.result.update.cosine < 1.0


@pytest.mark.parametrize("name", ["miss", "adalora", "loha", "vera", "dora"])
def test_inspect_describes_it_without_the_base(name: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", name)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/absent"}))
    found = inspect(str(adapter))
    assert found["kind"] == "adapter" if isinstance(found, dict) else found.kind == "adapter"


@pytest.mark.parametrize("rank", [6, 32])
def test_a_lora_of_a_dora_loses_what_it_says(rank: int, base: Path, tmp_path: Path) -> None:
    dora = adapter_of(base, tmp_path / "dora", "dora with rslora")
    manifest = to_lora(dora, tmp_path / "lora", LoraOptions(rank=rank), RUN, base=str(base))
    start, goal = tensors(base), merged_by_peft(base, dora)
    found = PeftModel.from_pretrained(plain(base), tmp_path / "lora").merge_and_unload().state_dict()
    lost = size = best = 0.0
    for key in (key for key, value in start.items() if not torch.equal(value, goal[key])):
        change = goal[key].double() - start[key].double()
        lost += float((found[key].double() - goal[key].double()).square().sum())
        size += float(change.square().sum())
        best += float(torch.linalg.svdvals(change)[rank:].square().sum())
    error = manifest.result.truncation.error
    assert error == pytest.approx((lost / size) ** 0.5, rel=1e-3, abs=1e-6)
    assert error == pytest.approx((best / size) ** 0.5, rel=1e-2, abs=1e-6)
    assert (error < 1e-5) == (rank == 32)
