"""Commands of several adapters or checkpoints, for mixtures of experts and for transposed layers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from svdconvert import (
    CombineOptions,
    ExtractOptions,
    LoraOptions,
    MergeOptions,
    Run,
    SplitOptions,
    combine,
    decompose,
    diff,
    extract,
    inspect,
    merge,
    to_lora,
)
from svdconvert.commands.verify import verify_merge
from svdconvert.errors import ArtifactError
from tests.mixtures import mixture
from tests.stock import plain, tensors, trained_from

RUN = Run(device="cpu", threads=1)
WEIGHTS = (0.7, -0.4)
MIXTURES = [("mixtral", False), ("mixtral", True), ("qwen3_moe", True), ("gpt_oss", True)]
Adapters = Callable[[str], list[Path]]


@pytest.fixture(scope="module", params=MIXTURES, ids=lambda one: f"{one[0]}-{one[1]}")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, stacked = request.param
    return mixture(family, tmp_path_factory.mktemp(family) / "base", stacked=stacked)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Two trained LoRAs in one form, made once. Tests must not write to them."""

    def make(form: str) -> list[Path]:
        home = tmp_path_factory.mktemp(form)
        decompose(base, home / "start", SplitOptions(rank=2, method="lora", experts=form), RUN)
        return [
            trained_from(home / "start", home / name, amount) for name, amount in (("a", 0.1), ("b", 0.3))
        ]

    return make


def merged_change(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    merge(adapter, out, MergeOptions(dtype="float32"), RUN, base=str(base))
    start = tensors(base)
    return {name: value.double() - start[name].double() for name, value in tensors(out).items()}


@pytest.mark.parametrize("form", ["fused", "each"])
def test_the_weighted_changes_of_experts_are_added(
    form: str, base: Path, adapters: Adapters, tmp_path: Path
) -> None:
    each = adapters(form)
    merge(each, tmp_path / "out", MergeOptions(weights=WEIGHTS, dtype="float32"), RUN, base=str(base))
    combine(each, tmp_path / "both", CombineOptions(weights=WEIGHTS), RUN)
    a, b = (merged_change(base, path, tmp_path / path.name) for path in each)
    both = merged_change(base, tmp_path / "both", tmp_path / "merged")
    start = tensors(base)
    found = tensors(tmp_path / "out")
    assert any("experts" in name and a[name].any() for name in a)
    for name, value in found.items():
        wanted = WEIGHTS[0] * a[name] + WEIGHTS[1] * b[name]
        assert torch.allclose(value.double() - start[name].double(), wanted, atol=1e-5), name
        assert torch.allclose(both[name], wanted, atol=1e-5), name


def test_factors_in_two_forms_are_merged_into_the_base_but_not_combined(
    base: Path, adapters: Adapters, tmp_path: Path
) -> None:
    mixed = [adapters("fused")[0], adapters("each")[1]]
    merge(mixed, tmp_path / "out", MergeOptions(dtype="float32"), RUN, base=str(base))
    a, b = (merged_change(base, path, tmp_path / path.name) for path in mixed)
    start = tensors(base)
    for name, value in tensors(tmp_path / "out").items():
        assert torch.allclose(value.double() - start[name].double(), a[name] + b[name], atol=1e-5), name
    with pytest.raises(ArtifactError, match="write both in one form"):
        combine(mixed, tmp_path / "both", run=RUN)


def test_the_change_of_experts_is_extracted_and_found_in_the_merged_model(
    base: Path, adapters: Adapters, tmp_path: Path
) -> None:
    adapter = adapters("fused")[1]
    merge(adapter, tmp_path / "tuned", MergeOptions(dtype="float32"), RUN, base=str(base))
    assert verify_merge(tmp_path / "tuned", [base], adapter, RUN).passed
    roles = {group.role for group in diff(base, tmp_path / "tuned", RUN).groups() if group.changed}
    assert any("experts" in role for role in roles)
    extract(base, tmp_path / "tuned", tmp_path / "lora", ExtractOptions(rank=8), RUN)
    assert not any("PeftModel" in line for line in inspect(tmp_path / "lora").next)
    merge(tmp_path / "lora", tmp_path / "again", MergeOptions(dtype="float32"), RUN, base=str(base))
    again = tensors(tmp_path / "again")
    for name, value in tensors(tmp_path / "tuned").items():
        assert torch.allclose(again[name].float(), value.float(), atol=1e-4), name


@pytest.mark.parametrize("form", ["mlx", "rwkv-peft"])
def test_a_format_without_experts_refuses_them(
    form: str, base: Path, adapters: Adapters, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=f"which the format {form} does not express"):
        to_lora(adapters("fused")[0], tmp_path / "out", LoraOptions(format=form), RUN)
    to_lora(adapters("fused")[0], tmp_path / "vllm", LoraOptions(format="vllm"), RUN)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, whose linear layers have their weights as (in, out)."""
    out = tmp_path_factory.mktemp("gpt2") / "base"
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16, **tokens)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    return out


def test_a_dora_of_transposed_layers_is_merged_as_peft_does(gpt2: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}
    model = get_peft_model(plain(gpt2), LoraConfig(r=3, task_type="CAUSAL_LM", **options))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(tmp_path / "dora")
    merge(tmp_path / "dora", tmp_path / "out", run=RUN, base=str(gpt2), init="none")
    stock = PeftModel.from_pretrained(plain(gpt2), tmp_path / "dora").merge_and_unload().state_dict()
    start = tensors(gpt2)
    found = tensors(tmp_path / "out")
    for name, value in found.items():
        assert torch.allclose(value, stock[name], atol=1e-5), name
    assert not torch.equal(
        found["transformer.h.0.attn.c_attn.weight"], start["transformer.h.0.attn.c_attn.weight"]
    )
    to_lora(tmp_path / "dora", tmp_path / "lora", LoraOptions(rank=16), RUN, base=str(gpt2))
    merge(tmp_path / "lora", tmp_path / "again", run=RUN, base=str(gpt2))
    assert all(
        torch.allclose(value, found[name], atol=1e-4) for name, value in tensors(tmp_path / "again").items()
    )


def test_the_change_of_transposed_layers_is_extracted(gpt2: Path, tmp_path: Path) -> None:
    decompose(gpt2, tmp_path / "start", SplitOptions(rank=2, method="lora"), RUN)
    adapter = trained_from(tmp_path / "start", tmp_path / "trained", 0.3)
    merge(adapter, tmp_path / "tuned", run=RUN, base=str(gpt2))
    extract(gpt2, tmp_path / "tuned", tmp_path / "lora", ExtractOptions(rank=2), RUN)
    stock = PeftModel.from_pretrained(plain(gpt2), tmp_path / "lora").merge_and_unload().state_dict()
    for name, value in tensors(tmp_path / "tuned").items():
        assert torch.allclose(stock[name], value, atol=1e-5), name
