"""Mixtures of experts: single experts are decomposed and merged like any matrix; PEFT cannot load them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from svdconvert.adapters.peft_files import open_adapter
from svdconvert.commands.decompose import decompose
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.commands.train import train
from svdconvert.config.train import TrainOptions
from svdconvert.errors import ArtifactError
from svdconvert.manifest.schema import read_manifest
from svdconvert.pipeline.decompose import SplitOptions
from tests.stock import adapted, logits, plain, tensors, trained_from

Build = Callable[..., Path]
every_mixture = pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])


@every_mixture
def test_every_expert_is_decomposed_and_no_router_is(
    family: str, checkpoint: Build, decomposed: Build
) -> None:
    base = checkpoint(family)
    adapted_names = read_manifest(decomposed(base)).matrices
    experts = [name for name in tensors(base) if ".experts." in name]
    assert len(experts) == 3 * 3 * (2 if family == "mixtral" else 1)
    assert set(experts) <= set(adapted_names)
    assert not any(name.endswith(".gate.weight") for name in adapted_names)


@every_mixture
def test_a_trained_expert_is_merged_into_what_transformers_loads(
    family: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=torch.float32)
    out = decomposed(base)
    trained = trained_from(out, tmp_path / "trained")
    merge(trained, tmp_path / "merged", residual=str(out))
    before, after = open_adapter(out / "pissa_init"), open_adapter(trained)
    found = tensors(tmp_path / "merged")
    for name, matrix in read_manifest(out).matrices.items():
        change = after.factors(matrix.module).dense(1.0) - before.factors(matrix.module).dense(1.0)
        assert torch.allclose(found[name], tensors(base)[name] + change, atol=1e-6)
    assert (logits(plain(tmp_path / "merged")) - logits(plain(base))).abs().max() > 0.01


@every_mixture
def test_stock_peft_refuses_factors_of_single_experts_instead_of_dropping_them(
    family: str, checkpoint: Build, decomposed: Build
) -> None:
    out = decomposed(checkpoint(family))
    with pytest.raises((KeyError, ValueError), match="LORA_PER_EXPERT"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out, subfolder="pissa_init")


@every_mixture
def test_to_lora_and_train_refuse_single_experts_and_say_why(
    family: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    out = decomposed(checkpoint(family))
    with pytest.raises(ArtifactError, match="experts one by one.*use merge"):
        to_lora(out, tmp_path / "lora")
    with pytest.raises(ArtifactError, match="experts one by one.*--targets attn"):
        train(out, tmp_path / "trained", TrainOptions(data="absent.jsonl"))
    assert list(tmp_path.iterdir()) == []


@every_mixture
def test_the_attention_of_a_mixture_is_decomposed_converted_and_merged(
    family: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=torch.float32)
    decompose(base, tmp_path / "split", SplitOptions(rank=4, targets=("attn",)))
    trained = trained_from(tmp_path / "split", tmp_path / "trained")
    to_lora(trained, tmp_path / "lora", residual=str(tmp_path / "split"))
    merge(trained, tmp_path / "merged", residual=str(tmp_path / "split"))
    merged = logits(plain(tmp_path / "merged"))
    assert (logits(adapted(base, tmp_path / "lora")) - merged).abs().max() < 1e-5 * float(merged.abs().max())
