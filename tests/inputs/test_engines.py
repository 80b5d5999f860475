"""inspect --for: what an engine refuses or ignores is named, and what to-lora writes for it has nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svdconvert import LoraOptions, Run, SplitOptions, TrainOptions, decompose, inspect, to_lora, train
from svdconvert.errors import ArtifactError
from svdconvert.inputs.engines import FORMATS, Engine, report_for
from tests.conftest import Build
from tests.program import svdconvert
from tests.reading import readable, write_sums

RUN = Run(device="cpu", threads=1)
ENGINES: tuple[Engine, ...] = ("peft", "vllm", "sglang", "mlx", "llama.cpp")


def adapter(directory: Path, more: dict[str, Any] | None = None, tensors: tuple[str, ...] = ()) -> Path:
    """A small adapter in PEFT's format, with these entries and tensors in addition."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | (more or {})))
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(8, 4)}
    factors |= {name: torch.ones(3) for name in tensors}
    save_file(factors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("engine", ["peft", "vllm", "sglang"])
def test_a_plain_lora_is_loaded_as_it_is(engine: Engine, tmp_path: Path) -> None:
    assert report_for(adapter(tmp_path / "lora"), engine).loads


@pytest.mark.parametrize(
    ("more", "refused", "ignored"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", ""),
        ({"use_dora": True}, "DoRA", ""),
        ({"bias": "all"}, "bias is 'all'", ""),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'", ""),
        ({"r": 4096}, "ranks up to", ""),
        ({"rank_pattern": {"q_proj": 8}}, "", "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "", "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "", ""),
    ],
    ids=str,
)
def test_vllm(more: dict[str, Any], refused: str, ignored: str, tmp_path: Path) -> None:
    found = report_for(adapter(tmp_path / "lora", more), "vllm")
    assert refused in "; ".join(found.refused) and bool(refused) == bool(found.refused)
    assert ignored in "; ".join(found.ignored) and bool(ignored) == bool(found.ignored)


def test_vllm_must_be_told_a_large_rank(tmp_path: Path) -> None:
    found = report_for(adapter(tmp_path / "lora", {"r": 100}), "vllm")
    assert found.loads and found.needed == ["--max-lora-rank 128"]


def test_sglang_ignores_rslora(tmp_path: Path) -> None:
    found = report_for(adapter(tmp_path / "lora", {"use_rslora": True}), "sglang")
    assert not found.refused and "use_rslora" in found.ignored[0]


@pytest.mark.parametrize(
    ("tensor", "vllm", "llama_cpp"),
    [
        ("lm_head.weight", "refused", "refused"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "refused", "refused"),
        ("model.norm.weight", "refused", "ignored"),
        ("model.embed_tokens.base_layer.weight", "ignored", ""),
        ("model.embed_tokens.lora_embedding_A", "", ""),
    ],
)
def test_tensors_that_are_no_factors_of_a_linear_layer(
    tensor: str, vllm: str, llama_cpp: str, tmp_path: Path
) -> None:
    path = adapter(tmp_path / "lora", tensors=(f"base_model.model.{tensor}",))
    for engine, expected in (("vllm", vllm), ("llama.cpp", llama_cpp)):
        found = report_for(path, engine)
        assert any(tensor in reason for reason in found.refused) == (expected == "refused")
        assert any(tensor in reason for reason in found.ignored) == (expected == "ignored")


def test_peft_would_load_a_residuals_adapter_wrongly(tmp_path: Path) -> None:
    entry = {"auto_mapping": {"svdconvert": {"base_is_residual": True}}}
    assert "residual" in report_for(adapter(tmp_path / "lora", entry), "peft").ignored[0]
    assert report_for(adapter(tmp_path / "sorsa", {"peft_type": "SORSA"}), "peft").refused


def test_what_to_lora_writes_for_an_engine_loads_there(checkpoint: Build, tmp_path: Path) -> None:
    base = readable(checkpoint("llama", dtype=torch.float32, tied=False), tmp_path / "base")
    data = write_sums(tmp_path / "rows.jsonl")
    decompose(base, tmp_path / "start", SplitOptions(rank=2, rslora=True, rank_pattern={"attn": 4}), RUN)
    options = TrainOptions(data=str(data), steps=1, batch_size=2, max_length=48, lr=0.1)
    train(tmp_path / "start", tmp_path / "trained", options, RUN)
    for name in ("vllm", "sglang", "llama.cpp"):
        assert not report_for(tmp_path / "trained", name).loads  # type: ignore[arg-type]
    for engine in ENGINES:
        out = tmp_path / engine
        extra = {"base": str(base)} if engine == "llama.cpp" else {}
        to_lora(tmp_path / "trained", out, LoraOptions(format=FORMATS[engine]), RUN, **extra)
        assert report_for(out, engine).loads
    assert inspect(tmp_path / "mlx", "vllm").next == [
        f"svdconvert to-lora {tmp_path / 'mlx'} -o LORA --format vllm"
    ]


def test_the_command_says_it(tmp_path: Path) -> None:
    place = adapter(tmp_path / "lora", {"use_dora": True})
    shown = svdconvert("inspect", place, "--for", "vllm")
    assert shown.status == 0 and "vllm refuses" in shown.out and "it is a DoRA" in shown.out
    assert svdconvert("inspect", place, "--for", "nothing").status == 2


def test_a_checkpoint_is_refused(checkpoint: Build) -> None:
    with pytest.raises(ArtifactError, match="is no adapter, and --for is about adapters"):
        report_for(checkpoint("llama"), "vllm")


@pytest.mark.parametrize(
    "more",
    [{"r": "x"}, {"r": 1e400}, {"rank_pattern": []}, {"auto_mapping": 3}, {"peft_type": ["\x1b[31m"]}],
    ids=str,
)
def test_odd_values_are_no_reason_to_fail(more: dict[str, Any], tmp_path: Path) -> None:
    place = adapter(tmp_path / "lora", more)
    for engine in ENGINES:
        report_for(place, engine)
