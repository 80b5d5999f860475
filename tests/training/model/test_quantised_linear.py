"""A linear layer that decodes its weight when it is used; stock transformers and PEFT on the same files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from svdconvert.commands.decompose import decompose
from svdconvert.config.options import SplitOptions
from svdconvert.layouts.base import LAYOUTS
from svdconvert.quantization.nf4 import Rule, encode
from svdconvert.training.model.load import load_network
from svdconvert.training.model.quantised_linear import QuantisedLinear
from svdconvert.training.model.quantised_loading import densify, weight_in_memory
from tests import tiny

SHAPES = [(64, 64), (96, 160), (33, 17), (5, 3)]


def layers(
    shape: tuple[int, int], double: bool = False, bias: bool = True
) -> tuple[QuantisedLinear, nn.Linear]:
    """A quantised layer, and a dense one with the decoded weight."""
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0], bias=bias)
    stored = encode(torch.randn(shape) * 0.1, Rule(double=double))
    layer = QuantisedLinear(shape[1], shape[0], dense.bias)
    layer.fill(weight_in_memory(stored, torch.bfloat16))
    with torch.no_grad():
        dense.weight.copy_(stored.decode().bfloat16())
    return layer, dense


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_decoded_weight(shape: tuple[int, int], double: bool) -> None:
    quantised, dense = layers(shape, double)
    inputs = torch.randn(4, 7, shape[1])
    found = []
    for layer in (quantised, dense):
        x = inputs.clone().requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        assert x.grad is not None
        found.append((out.detach(), x.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_computes_in_bfloat16(bias: bool) -> None:
    quantised, dense = layers((64, 64), bias=bias)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        one = quantised(x)
        other = dense(x)
    assert one.dtype == torch.bfloat16
    torch.testing.assert_close(one, other)


def test_the_memory_stays_quantised_after_a_step() -> None:
    quantised, _ = layers((256, 256))
    x = torch.randn(2, 256, requires_grad=True)
    out = quantised(x)
    out.sum().backward()
    tensors: list[Tensor] = [*quantised.parameters(), *quantised.buffers()]
    assert sum(tensor.nbytes for tensor in tensors) < 256 * 256 * 0.6
    assert not list(quantised.parameters())[1:], "only the bias is a parameter"


def test_the_layer_is_in_no_state_dict_but_for_its_bias() -> None:
    assert [*layers((64, 64))[0].state_dict()] == ["bias"]


def wide_llama(directory: Path) -> Path:
    """A Llama whose sides are multiples of 64, for which bitsandbytes' CPU kernel is right."""
    from transformers import LlamaForCausalLM

    config = tiny.configuration(
        "llama",
        vocab_size=tiny.VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    tiny.fill(model)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("double", [False, True])
def test_a_loaded_network_holds_no_dense_copy(tmp_path: Path, double: bool) -> None:
    options = SplitOptions(rank=8, residual_format="nf4", double_quant=double)
    decompose(wide_llama(tmp_path / "base"), tmp_path / "out", options)
    network = load_network(tmp_path / "out", LAYOUTS.get("llama"), None)
    quantised = [layer for layer in network.modules() if isinstance(layer, QuantisedLinear)]
    assert len(quantised) == 14
    names = {name for name, _ in network.named_parameters()}
    assert not any("proj" in name for name in names)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        before = network(input_ids=ids).logits
        densify(network, torch.bfloat16)
        after = network(input_ids=ids).logits
    assert torch.equal(before, after)


def test_weights_that_are_trained_have_the_dtype_of_training(tmp_path: Path) -> None:
    decompose(wide_llama(tmp_path / "base"), tmp_path / "out", SplitOptions(rank=8, residual_format="nf4"))
    network = load_network(tmp_path / "out", LAYOUTS.get("llama"), torch.float32)
    decoded = {
        path: layer.weight for path, layer in network.named_modules() if isinstance(layer, QuantisedLinear)
    }
    densify(network, torch.float32)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    for path, weight in decoded.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(network.get_parameter(f"{path}.weight"), weight.float())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("double", [False, True])
def test_stock_transformers_and_peft_load_and_train_the_same_network(tmp_path: Path, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = SplitOptions(rank=8, residual_format="nf4", double_quant=double)
    decompose(wide_llama(tmp_path / "base"), tmp_path / "out", options)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(stock.lm_head) is nn.Linear
    ids = torch.arange(1, 20)[None]
    ours = load_network(tmp_path / "out", LAYOUTS.get("llama"), None)
    with torch.no_grad():
        # In eval mode bitsandbytes packs the weights again, and rounds differently.
        theirs = stock.train()(input_ids=ids).logits
        assert torch.equal(ours(input_ids=ids).logits, theirs)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "out", subfolder="pissa_init", is_trainable=True)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
