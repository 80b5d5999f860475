"""Adapters of heads and embeddings, resized vocabularies, foreign heads, against stock PEFT's own models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from svdconvert import MergeOptions, Run, merge, to_lora
from svdconvert.errors import ArtifactError
from tests.conftest import Build
from tests.reading import write_tokenizer
from tests.stock import logits, tensors
from tests.tiny import VOCABULARY

RUN = Run(device="cpu", threads=1)
MORE = 4  # tokens of a resized vocabulary

KINDS: dict[str, dict[str, Any]] = {
    "a head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "both with rslora and patterns": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "use_rslora": True,
        "rank_pattern": {"embed_tokens": 3},
        "alpha_pattern": {"lm_head": 5},
    },
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "factors of a head and whole embeddings": {
        "target_modules": ["q_proj", "lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
    "neither": {"target_modules": ["q_proj"]},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def trained(base: Path, kind: str, out: Path, more: int = 0) -> tuple[torch.Tensor, PeftModel]:
    """An adapter of PEFT with random values, saved in `out`; (the logits, the model)."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    if more:
        model.resize_token_embeddings(VOCABULARY + more)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **KINDS[kind]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(out)
    return logits(adapted), adapted


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@every_kind
@ties
def test_the_merged_model_and_the_lora_compute_what_peft_computes(
    family: str, kind: str, tied: bool, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=torch.float32, tied=tied)
    expected, _ = trained(base, kind, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", run=RUN, base=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    to_lora(tmp_path / "adapter", tmp_path / "lora", run=RUN, base=str(base))
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-4)
    merge(tmp_path / "lora", tmp_path / "again", run=RUN, base=str(base))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@every_kind
def test_without_ties_it_is_what_peft_merges(kind: str, checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama", dtype=torch.float32, tied=False)
    _, adapted = trained(base, kind, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", run=RUN, base=str(base))
    found = tensors(tmp_path / "merged")
    stock = adapted.merge_and_unload().state_dict()
    assert found.keys() == {name for name in stock if "rotary" not in name}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, stock[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@every_kind
@ties
def test_a_resized_vocabulary_is_merged_and_converted(
    kind: str, tied: bool, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32, tied=tied)
    expected, adapted = trained(base, kind, tmp_path / "adapter", MORE)
    write_tokenizer(tmp_path / "adapter")
    if not tied and kind in ("a head", "embeddings"):
        # PEFT stores the new rows of the adapted one only, so nobody can make the model again.
        with pytest.raises(ArtifactError, match="was trained with another vocabulary.*resize the model"):
            merge(tmp_path / "adapter", tmp_path / "merged", run=RUN, base=str(base))
        return
    merge(tmp_path / "adapter", tmp_path / "merged", run=RUN, base=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == VOCABULARY + MORE
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert logits(merged).shape[-1] == VOCABULARY + MORE
    to_lora(tmp_path / "adapter", tmp_path / "lora", run=RUN, base=str(base))
    plain = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(5)
    plain.resize_token_embeddings(VOCABULARY + MORE)
    lora = PeftModel.from_pretrained(plain, tmp_path / "lora")
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_untied_head_is_rounded_once_to_the_type_of_the_embeddings(
    checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", tied=True)
    trained(base, "a head", tmp_path / "adapter")
    for name, options in (("auto", MergeOptions()), ("wide", MergeOptions(dtype="float32"))):
        merge(tmp_path / "adapter", tmp_path / name, options, RUN, base=str(base))
    narrow, wide = tensors(tmp_path / "auto")["lm_head.weight"], tensors(tmp_path / "wide")["lm_head.weight"]
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), narrow)
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["tie_word_embeddings"] is False


Head = Callable[..., Any]


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert", "roberta"])
def test_a_foreign_classifier_is_merged(family: str, checkpoint: Build, tmp_path: Path) -> None:
    """Its head is not in the base; the name of the task says which class has it."""
    base = checkpoint(family, dtype=torch.float32)
    torch.manual_seed(0)
    if family == "bert":  # its causal model has no pooler
        AutoModel.from_pretrained(base).save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    targets = ["q_proj"] if family in ("llama", "qwen2") else ["query"]
    adapted = get_peft_model(model, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=targets))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    merge(tmp_path / "adapter", tmp_path / "merged", run=RUN, base=str(base))
    merged, loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not [name for name in loaded["missing_keys"] if "pooler" not in name]
    assert merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    to_lora(tmp_path / "adapter", tmp_path / "lora", run=RUN, base=str(base))
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    lora = PeftModel.from_pretrained(plain, tmp_path / "lora")
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-4)


def test_a_new_part_without_a_task_is_refused(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="trained score.weight .* the task_type of the adapter is None"):
        merge(tmp_path / "adapter", tmp_path / "merged", run=RUN, base=str(base))
