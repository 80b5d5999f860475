"""Linear layers by another library give what torch's own give."""

import pytest
import torch
from torch import nn

from svdconvert.evaluation.fast_linears import use_fast_products


class Other(nn.Linear):
    """A layer with a forward pass of its own."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 96), (96,), (0, 96), (2, 1, 96)])
def test_products_are_those_of_float64(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, bias=bias).requires_grad_(False)
    inputs = torch.randn(shape)
    expected = torch.nn.functional.linear(
        inputs.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    use_fast_products(nn.Sequential(layer))
    found = layer(inputs)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.equal(layer(inputs), found)


def test_other_layers_are_left_as_they_are() -> None:
    layers = [nn.Linear(8, 8).bfloat16(), Other(8, 8), nn.LayerNorm(8)]
    use_fast_products(nn.Sequential(*layers))
    assert not any("forward" in vars(layer) for layer in layers)
