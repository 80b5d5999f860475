"""A model that computes no numbers, or knows a token for which it has no embedding, does not answer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from svdconvert.errors import ArtifactError
from svdconvert.evaluation.sound_network import require_sound
from tests.evaluation.directories import lively, write_questions
from tests.program import refused

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return lively(tmp_path / "model")


def commands(model: Path, tmp_path: Path) -> list[list[object]]:
    """The commands with which a model answers."""
    data = write_questions(tmp_path / "rows.jsonl", 2)
    asking: list[object] = ["eval", model, "--tasks", "gsm8k", "--data", data, "-o", tmp_path / "out"]
    return [[*asking, "--max-new-tokens", 2], ["chat", model, "--prompt", "one", "--max-new-tokens", 2]]


@pytest.mark.parametrize("name", [Q, "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(name: str, value: float, model: Path, tmp_path: Path) -> None:
    stored = load_file(model / "model.safetensors")
    stored[name].view(-1)[3] = value
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    for words in commands(model, tmp_path):
        refused(*words, words=[model, name, "holds NaN or Inf"])


def test_a_weight_that_overflows_in_the_chosen_type_is_named(model: Path, tmp_path: Path) -> None:
    stored = load_file(model / "model.safetensors")
    stored[Q][0, 0] = 1e30
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    for words in commands(model, tmp_path):
        refused(*words, "--dtype", "float16", words=[Q, "as float16", "--dtype float32"])


def test_a_token_without_an_embedding_is_named(model: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["one"] = 4000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    for words in commands(model, tmp_path):
        refused(*words, words=["the token 4000", "61 embeddings"])


class Fixed(nn.Module):
    """A network with the given scores."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self._scores = scores

    def forward(self) -> CausalLMOutput:
        return CausalLMOutput(logits=self._scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(value: float) -> None:
    scores = torch.zeros(2, 3, 5)
    network = Fixed(scores)
    require_sound(network, "model")
    scores[0, 0, 0] = float("-inf")  # a token that is ruled out is no fault
    network()
    scores[1, 2, 4] = value
    with pytest.raises(ArtifactError, match="NaN or Inf instead of scores"):
        network()
