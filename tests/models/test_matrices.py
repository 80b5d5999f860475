"""Which parameters of a network are matrices that can be adapted."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from svdconvert.models.matrices import NetworkMatrices, find_matrices
from tests.tiny import configuration


@pytest.fixture
def network() -> torch.nn.Module:
    """A mixture of experts without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(configuration("qwen3_moe"))


def stacked(found: NetworkMatrices) -> set[str]:
    return {name.rpartition(".")[2] for name, one in found.known.items() if one.is_stacked}


@pytest.mark.parametrize("called", [None, "Qwen3MoeNaiveMoe"])
def test_experts_are_known_by_their_class_or_by_the_name_of_their_module(
    called: str | None, network: torch.nn.Module
) -> None:
    for name, module in network.named_modules():
        if called and name.endswith(".experts"):
            module.__class__ = type(called, (type(module),), {})
    assert stacked(find_matrices(network, set())) == {"gate_up_proj", "down_proj"}


def test_stacked_matrices_that_nothing_tells_what_they_are_for_are_named(network: torch.nn.Module) -> None:
    network.model.layers[0].odd = torch.nn.Module()
    network.model.layers[0].odd.register_parameter("weight", torch.nn.Parameter(torch.empty(3, 8, 8)))
    found = find_matrices(network, set())
    assert "model.layers.0.odd.weight" not in found.known
    assert found.left_out["model.layers.0.odd.weight"] == "no linear layer and no experts"
