"""Checkpoints whose config.json makes another network of the same tensors are named; nothing else is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.test_extract import tuned_from
from tests.conftest import Build
from tests.program import refused, succeeded
from tests.reading import readable


@pytest.fixture
def tuned(checkpoint: Build, tmp_path: Path) -> Path:
    return tuned_from(checkpoint("llama"), tmp_path / "tuned")


@pytest.mark.parametrize("command", ["combine", "extract"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rms_norm_eps": 0.5}, "rms_norm_eps"),
        ({"num_attention_heads": 2, "head_dim": 16}, "head_dim, num_attention_heads"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_parameters.rope_theta"),
        ({"use_cache": False, "transformers_version": "4.1", "eos_token_id": 7, "rope_scaling": None}, ""),
    ],
    ids=["eps", "heads", "rope", "others"],
)
def test_other_settings_are_named(
    command: str, changes: dict[str, Any], named: str, checkpoint: Build, tuned: Path, tmp_path: Path
) -> None:
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | changes))
    rank = ["--rank", 2] if command == "extract" else []
    said = succeeded(command, checkpoint("llama"), tuned, "-o", tmp_path / "out", *rank).err
    assert ("other values than that of" in said) == bool(named)
    assert f"which is kept: {named}" in said if named else True


@pytest.mark.parametrize(
    "command", [["chat", "--prompt", "1"], ["eval", "--tasks", "gsm8k", "--data", "rows"]]
)
def test_a_model_with_codes_in_place_of_weights_is_not_asked(
    command: list[str], checkpoint: Build, tmp_path: Path
) -> None:
    model = readable(shutil.copytree(checkpoint("llama"), tmp_path / "copy"), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 2", "answer": "#### 3"}\n')
    stored = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    stored[name] = (stored[name].float() * 50).to(torch.int8)
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    words = [str(tmp_path / "rows.jsonl") if word == "rows" else word for word in command[1:]]
    refused(command[0], model, *words, "--max-new-tokens", 1, words=[name, "I8"])
