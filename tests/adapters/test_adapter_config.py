"""Every value of a foreign adapter_config.json is bounded, and held against the tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svdconvert.adapters import adapter_config
from svdconvert.adapters.adapter_config import CONFIG, read_adapter_config
from svdconvert.adapters.peft_files import WEIGHTS, open_adapter
from svdconvert.errors import ArtifactError
from tests.conftest import Build

Q = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture
def saved(checkpoint: Build, tmp_path: Path) -> Callable[..., Path]:
    """A LoRA of rank 4 that PEFT saved, with changes to its configuration or its tensors."""

    def make(tensors: dict[str, torch.Tensor] | None = None, **values: Any) -> Path:
        model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        if tensors:
            file = tmp_path / "adapter" / WEIGHTS
            changed = {f"{Q}{name}.weight": value for name, value in tensors.items()}
            save_file(load_file(file) | changed, file, metadata={"format": "pt"})
        return tmp_path / "adapter"

    return make


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_ordinary_adapter_is_read(saved: Callable[..., Path]) -> None:
    adapter = open_adapter(saved())
    assert adapter.config.rank == 4
    assert adapter.config.base_is_residual is None


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"r": -2},
        {"r": 2.7},
        {"r": True},
        {"r": "4"},
        {"r": float("inf")},
        {"r": 10**400},
        {"lora_alpha": float("nan")},
        {"bias": "weird"},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e308},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": [1]},
        {"rank_pattern": {"q_proj": None}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q" * 2000: 4}},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"base_model_name_or_path": {"a": 1}},
        {"base_model_name_or_path": "a" * 5000},
        {"modules_to_save": "norm"},
        {"peft_type": "BOFT"},
        {"peft_type": None},
    ],
    ids=lambda values: str(values)[:40],
)
def test_a_value_out_of_bounds_is_refused_by_name(saved: Callable[..., Path], values: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=next(iter(values))):
        read_adapter_config(saved(**values))


def test_a_pattern_that_would_backtrack_without_end_is_matched(saved: Callable[..., Path]) -> None:
    adapter = open_adapter(saved(rank_pattern={"(([a-z._0-9])+)+\u0001": 2}))
    assert adapter.config.rank_of("model.layers.0.self_attn.q_proj") == 4


@pytest.mark.parametrize("pattern", ["(" * 9 + "a{99}" + "){99}" * 9, "(q_proj){e<=3}", "(?R)", "a{1001}"])
def test_a_pattern_that_takes_memory_or_is_none_of_pefts_is_refused(
    saved: Callable[..., Path], pattern: str
) -> None:
    with pytest.raises(ArtifactError, match="which must be names or regular expressions"):
        read_adapter_config(saved(rank_pattern={pattern: 2}))


def test_a_pattern_with_a_small_count_is_matched(saved: Callable[..., Path]) -> None:
    config = read_adapter_config(saved(rank_pattern={r"layers\.\d{1,2}\.q_proj": 2}))
    assert (config.rank_of("model.layers.10.q_proj"), config.rank_of("model.layers.100.q_proj")) == (2, 4)


def test_a_pattern_that_takes_too_long_is_refused(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: object, **options: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(adapter_config, "_compiled", lambda key: SimpleNamespace(match=slow))
    with pytest.raises(ArtifactError, match="takes too long to match"):
        open_adapter(saved(rank_pattern={"q_proj": 4}))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"r": 2}, "have rank 4, but rank 2 in adapter_config.json"),
        ({"r": 8}, "have rank 4, but rank 8 in adapter_config.json"),
        ({"rank_pattern": {"q_proj": 2}}, "have rank 4, but rank 2 in adapter_config.json"),
    ],
)
def test_a_rank_that_the_factors_do_not_have_is_refused_as_peft_does(
    saved: Callable[..., Path], checkpoint: Build, values: dict[str, Any], complaint: str
) -> None:
    directory = saved(**values)
    with pytest.raises(ArtifactError, match=complaint):
        open_adapter(directory)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(model, directory)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"lora_B": torch.ones(32, 3)}, "does not fit the rank 4"),
        ({"lora_A": torch.ones(32)}, "is not a factor"),
        ({"lora_A": torch.ones(4, 32, 1)}, "is not a factor"),
        ({"lora_A": torch.ones(0)}, "is empty"),
        ({"lora_A": torch.ones(4, 32, dtype=torch.uint8)}, "is stored as U8"),
        ({"lora_A": torch.ones(4, 32, dtype=torch.complex64)}, "is stored as C64"),
        ({"lora_S": torch.ones(3, 3, 3)}, "is not a factor"),
        ({"lora_R": torch.ones(7, 7)}, "does not fit the rank 4"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    saved: Callable[..., Path], tensors: dict[str, torch.Tensor], complaint: str
) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        open_adapter(saved(tensors))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused_when_they_are_read(
    saved: Callable[..., Path], value: float
) -> None:
    adapter = open_adapter(saved({"lora_B": torch.full((32, 4), value)}))
    with pytest.raises(ArtifactError, match="holds NaN or Inf"):
        adapter.factors("model.layers.0.self_attn.q_proj")
