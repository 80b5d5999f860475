"""Layers whose weights are stored as (in, out) are trained and converted like any other."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from svdconvert.adapters.peft_files import open_adapter
from svdconvert.commands.decompose import decompose
from svdconvert.config.options import SplitOptions
from svdconvert.manifest.place import Place
from svdconvert.manifest.schema import Matrix
from svdconvert.training.model.conv1d import as_linear
from svdconvert.training.model.inject import inject_adapters
from svdconvert.training.model.residuals import replace_weights
from tests.families.check import TOLERANCE, load, logits, make
from tests.stock import start_of


def test_a_conv1d_becomes_the_linear_layer_that_does_the_same() -> None:
    conv = Conv1D(5, 3)
    torch.nn.init.normal_(conv.bias)
    linear = as_linear(conv)
    assert isinstance(linear, torch.nn.Linear)
    x = torch.randn(2, 3)
    torch.testing.assert_close(linear(x), conv(x))
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    other = torch.nn.Linear(3, 5)
    assert as_linear(other) is other


def test_residuals_are_written_transposed_into_a_conv1d() -> None:
    network = torch.nn.ModuleDict({"conv": Conv1D(5, 3)})
    stored_IO = torch.randn(3, 5)
    place = Place(parameter="conv.weight", transposed=True)
    matrix = Matrix(
        module="conv", role="mlp.conv", place=place, shape=(5, 3), dtype="F32", rank=1, scale=1.0, error=0.0
    )
    replace_weights(network, {"conv.weight": stored_IO}, {"conv.weight": matrix}, {"conv": "conv"}, None)
    assert torch.equal(network["conv"].weight, stored_IO)


@pytest.mark.slow
def test_our_network_with_adapters_is_that_of_peft(tmp_path: Path) -> None:
    make("gpt2", "causal", tmp_path / "base")
    decompose(tmp_path / "base", tmp_path / "out", SplitOptions(rank=2))
    start = start_of(tmp_path / "out")
    wanted = logits(PeftModel.from_pretrained(load("causal", tmp_path / "out"), start))
    adapter = open_adapter(start)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    factors = {name: (adapter.factors(name), adapter.config.scale(name)) for name in adapter.modules}
    inject_adapters(network, factors, frozenset({"lora_A", "lora_B"}))
    assert (logits(network) - wanted).abs().max() < TOLERANCE * wanted.std()
