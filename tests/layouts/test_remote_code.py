"""A model whose code is in its own repository: its code runs only if the user allows it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdconvert.commands.decompose import decompose
from svdconvert.commands.merge import merge
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.errors import UnknownNameError
from svdconvert.inputs.model import open_model
from tests.program import refused, succeeded

CONFIGURATION = """
from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny-remote"

    def __init__(self, hidden_size=16, num_hidden_layers=2, vocab_size=32, **values):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = vocab_size
        super().__init__(**values)
"""
MODELING = """
import pathlib
from torch import nn
from transformers import PreTrainedModel
from .configuration_tiny import TinyConfig

pathlib.Path("{mark}").touch()

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mixer = nn.Linear(width, width, bias=False)
        self.ffn = nn.ModuleDict({{"up": nn.Linear(width, 24), "down": nn.Linear(24, width)}})

class TinyForCausalLM(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVDCONVERT_CACHE", str(tmp_path / "cache"))
    base = tmp_path / f"base_{tmp_path.name}"  # transformers keeps the code of a directory by its name
    base.mkdir()
    (base / "configuration_tiny.py").write_text(CONFIGURATION)
    (base / "modeling_tiny.py").write_text(MODELING.format(mark=tmp_path / "ran"))
    config = {
        "model_type": "tiny-remote",
        "architectures": ["TinyForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_tiny.TinyConfig",
            "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        },
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 32,
    }
    (base / "config.json").write_text(json.dumps(config))
    shapes = {"embed.weight": (32, 16), "head.weight": (32, 16)}
    for layer in range(2):
        shapes |= {
            f"blocks.{layer}.mixer.weight": (16, 16),
            f"blocks.{layer}.ffn.up.weight": (24, 16),
            f"blocks.{layer}.ffn.up.bias": (24,),
            f"blocks.{layer}.ffn.down.weight": (16, 24),
            f"blocks.{layer}.ffn.down.bias": (16,),
        }
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, base / "model.safetensors")
    return base


def test_the_code_of_a_repository_runs_only_if_it_is_allowed(remote: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'tiny-remote', whose code .* --trust-remote-code .* names"):
        decompose(remote, tmp_path / "out", SplitOptions(rank=2))
    assert not (tmp_path / "ran").exists()
    manifest = decompose(remote, tmp_path / "out", SplitOptions(rank=2), Run(trust_remote_code=True))
    assert (tmp_path / "ran").exists()
    assert {matrix.role for matrix in manifest.matrices.values()} == {"mixer", "mlp.up", "mlp.down"}


def test_a_layout_that_was_found_once_needs_the_code_no_more(remote: Path, tmp_path: Path) -> None:
    model = open_model(str(remote))
    found = replace(model, trust_remote_code=True).layout()[1]
    (tmp_path / "ran").unlink()
    assert model.layout()[1] == found
    assert not (tmp_path / "ran").exists()
    (remote / "modeling_tiny.py").write_text(MODELING.format(mark=tmp_path / "ran") + "\n# changed\n")
    with pytest.raises(UnknownNameError, match="--trust-remote-code"):
        model.layout()


def test_the_layout_by_names_runs_no_code(remote: Path, tmp_path: Path) -> None:
    manifest = decompose(remote, tmp_path / "out", SplitOptions(rank=2, layout="names"))
    assert len(manifest.matrices) == 6
    assert not (tmp_path / "ran").exists()


def adapter_of(out: Path) -> Path:
    """A LoRA for one matrix, as PEFT writes it: nothing records that it started at zero."""
    out.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["mixer"]}
    (out / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.blocks.0.mixer"
    factors = {f"{key}.lora_A.weight": torch.randn(2, 16), f"{key}.lora_B.weight": torch.randn(16, 2)}
    save_file(factors, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize("command", ["merge", "merge A B", "to-lora", "combine", "verify", "inspect"])
def test_every_command_that_asks_for_the_code_can_be_allowed_to_run_it(
    command: str, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(tmp_path / "adapter")
    words = {
        "merge": ["merge", adapter, "-o", tmp_path / "out", "--base", remote],
        "merge A B": ["merge", adapter, adapter, "-o", tmp_path / "out", "--base", remote],
        "to-lora": ["to-lora", adapter, "-o", tmp_path / "out", "--base", remote],
        "combine": ["combine", adapter, adapter, "-o", tmp_path / "out", "--base", remote],
        "verify": ["verify", "--merged", tmp_path / "merged", "--base", remote, "--adapter", adapter],
        "inspect": ["inspect", remote],
    }[command]
    if command == "verify":
        merge(adapter, tmp_path / "merged", base=str(remote), run=Run(trust_remote_code=True))
        (tmp_path / "ran").unlink()
        monkeypatch.setenv("SVDCONVERT_CACHE", str(tmp_path / "empty"))
    if command == "inspect":
        assert "no known layout" in succeeded(*words).out
    else:
        refused(*words, words=["--trust-remote-code"])
    assert not (tmp_path / "ran").exists()
    assert "no known layout" not in succeeded(*words, "--trust-remote-code").out
    assert (tmp_path / "ran").exists()
