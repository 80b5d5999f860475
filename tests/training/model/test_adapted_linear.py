"""An adapted layer is the dense formula, computed without the dense matrix."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from svdconvert.linalg.factors import Factors
from svdconvert.training.model.adapted_linear import AdaptedLinear, _dropout_mask

OUT, IN, RANK = 12, 20, 3
CORES = {"no core": None, "a vector core": (RANK,), "a matrix core": (RANK, RANK)}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias).to(dtype)


def factors(core: tuple[int, ...] | None = None) -> Factors:
    return Factors(
        numbers(OUT, RANK, seed=1), numbers(RANK, IN, seed=2), numbers(*core, seed=3) if core else None
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("core", CORES)
def test_an_adapted_layer_is_the_dense_formula(core: str, bias: bool) -> None:
    base, adapter = linear(bias), factors(CORES[core])
    x = numbers(2, 5, IN, seed=4)
    expected = x @ (base.weight + adapter.dense(0.5)).T + (base.bias if bias else 0.0)
    got = AdaptedLinear(base, adapter, 0.5, frozenset({"lora_B"}))(x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("core", CORES)
def test_under_autocast_the_adapter_computes_in_bf16(core: str) -> None:
    layer = AdaptedLinear(linear(), factors(CORES[core]), 0.5, frozenset({"lora_B"}))
    x = numbers(2, 5, IN, seed=4)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.2)
    assert not torch.equal(got, exact.bfloat16())


def test_without_autocast_a_bf16_base_gets_a_float32_adapter_and_one_rounding() -> None:
    base, adapter = linear(dtype=torch.bfloat16), factors()
    x = numbers(2, 5, IN, seed=4).bfloat16()
    got = AdaptedLinear(base, adapter, 0.5, frozenset({"lora_B"}))(x)
    low = x.float() @ adapter.right_RI.T * 0.5
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (base(x) + low @ adapter.left_OR.T).bfloat16())


def test_the_product_of_the_factors_is_never_built() -> None:
    layer = AdaptedLinear(linear(), factors((RANK,)), 0.5, frozenset({"lora_A", "lora_B", "lora_S"}))
    seen: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        layer(numbers(7, IN, seed=4)).sum().backward()
    assert seen
    assert (OUT, IN) not in seen
    assert (IN, OUT) not in seen


@pytest.mark.parametrize(
    "trains", [{"lora_B"}, {"lora_A", "lora_B"}, {"lora_S"}, {"lora_A", "lora_B", "lora_S"}]
)
def test_only_the_trained_factors_get_gradients(trains: set[str]) -> None:
    layer = AdaptedLinear(linear(), factors((RANK,)), 1.0, frozenset(trains))
    layer(numbers(7, IN, seed=4)).square().sum().backward()
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is not None} == trains
    assert {name for name, _ in layer.named_buffers()} == {"lora_A", "lora_B", "lora_S"} - trains
    assert not layer.base.weight.requires_grad
    assert all(layer.factor(name).grad.abs().sum() > 0 for name in trains)


def test_with_a_frozen_a_the_large_activation_is_not_saved() -> None:
    layer = AdaptedLinear(linear(), factors(), 1.0, frozenset({"lora_B"}))
    seen: list[tuple[int, ...]] = []
    x = numbers(7, IN, seed=4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert (7, RANK) in seen
    assert (7, IN) not in seen


def test_the_factors_are_contiguous_float32_copies() -> None:
    stored = Factors(numbers(RANK, OUT, seed=1).bfloat16().T, numbers(9, IN, seed=2)[::3])
    layer = AdaptedLinear(linear(), stored, 1.0, frozenset({"lora_A"}))
    before = stored.right_RI.clone()
    layer.factor("lora_A").data.zero_()
    assert torch.equal(stored.right_RI, before)
    for name in ("lora_A", "lora_B"):
        assert layer.factor(name).is_contiguous()
        assert layer.factor(name).dtype == torch.float32


@pytest.mark.parametrize("core", CORES)
def test_the_factors_are_read_back_unchanged(core: str) -> None:
    put_in = factors(CORES[core])
    layer = AdaptedLinear(linear(), put_in, 2.0, frozenset({"lora_B"}))
    came_back = layer.copy_factors()
    assert came_back.pieces().keys() == put_in.pieces().keys()
    assert all(torch.equal(came_back.pieces()[name], piece) for name, piece in put_in.pieces().items())
    layer.factor("lora_B").data.add_(1.0)
    assert torch.equal(came_back.left_OR, put_in.left_OR)
    assert not came_back.left_OR.requires_grad


def test_dropout_is_active_only_in_training() -> None:
    layer = AdaptedLinear(linear(), factors(), 1.0, frozenset({"lora_B"}), dropout=0.5)
    x = numbers(7, IN, seed=4)
    layer.eval()
    quiet = layer(x)
    assert torch.equal(quiet, layer(x))
    layer.train()
    torch.manual_seed(0)
    assert not torch.equal(quiet, layer(x))


def test_a_missing_factor_cannot_be_trained() -> None:
    with pytest.raises(AssertionError, match="lora_S"):
        AdaptedLinear(linear(), factors(), 1.0, frozenset({"lora_S"}))


def test_the_printout_shows_rank_scale_and_trained_factors() -> None:
    layer = AdaptedLinear(linear(), factors(), 0.5, frozenset({"lora_B"}))
    assert "rank=3, scale=0.5, trains=lora_B" in str(layer)


def saved_bytes(layer: AdaptedLinear, x: Tensor) -> int:
    """Bytes saved for the backward pass in addition to parameters and buffers, each storage counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*layer.parameters(), *layer.buffers()]}
    kept: dict[int, int] = {}

    def pack_examples(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_examples, lambda tensor: tensor):
        layer(x).sum()
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_fa_saves_r_values_per_token_and_lora_the_full_input(dropout: float) -> None:
    tokens, adapter = 200, factors()
    x = numbers(tokens, IN, seed=4).requires_grad_()
    frozen = AdaptedLinear(linear(), adapter, 0.5, frozenset({"lora_B"}), dropout)
    trained = AdaptedLinear(linear(), adapter, 0.5, frozenset({"lora_A", "lora_B"}), dropout)
    assert saved_bytes(frozen, x) == tokens * RANK * 4
    assert saved_bytes(trained, x) >= tokens * (IN + RANK) * 4


def test_a_bf16_activation_is_not_saved_as_float32() -> None:
    layer = AdaptedLinear(linear(dtype=torch.bfloat16), factors(), 0.5, frozenset({"lora_B"}))
    assert saved_bytes(layer, numbers(200, IN).bfloat16().requires_grad_()) == 200 * RANK * 4


@pytest.mark.parametrize("core", CORES)
def test_freezing_a_does_not_change_the_other_gradients(core: str) -> None:
    x, adapter = numbers(7, IN, seed=4), factors(CORES[core])
    gradients = []
    for trains in ({"lora_B"}, {"lora_A", "lora_B"}):
        layer, inputs = AdaptedLinear(linear(), adapter, 0.5, frozenset(trains)), x.clone().requires_grad_()
        layer(inputs).square().sum().backward()
        gradients.append((inputs.grad, layer.factor("lora_B").grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_backward_pass_uses_the_dropout_mask_of_the_forward_pass() -> None:
    torch.manual_seed(5)
    layer = AdaptedLinear(linear(bias=False), factors(), 1.0, frozenset({"lora_B"}), dropout=0.5)
    layer.base.weight.data.zero_()
    x = numbers(1, IN, seed=4).requires_grad_()
    out = layer(x)
    # Without a bias the layer is linear in what dropout leaves: x . dy/dx is y, entry by entry.
    for place in range(OUT):
        (slope,) = torch.autograd.grad(out[0, place], x, retain_graph=True)
        assert float((x * slope).sum().detach()) == pytest.approx(
            float(out[0, place].detach()), rel=1e-4, abs=1e-5
        )
        assert 0 < int((slope == 0).sum()) < IN


def test_dropout_of_one_half_doubles_the_remaining_inputs() -> None:
    kept = torch.cat([_dropout_mask(torch.ones(1000), 0.5, seed) for seed in range(10)])
    assert set(kept.tolist()) == {0.0, 2.0}
    assert abs(float(kept.mean()) - 1.0) < 0.05
    assert torch.equal(_dropout_mask(torch.ones(50), 0.3, 7), _dropout_mask(torch.ones(50), 0.3, 7))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_corrected_gradient_is_the_least_squares_one(scale: float) -> None:
    x, adapter = numbers(40, IN, seed=4), factors()
    layer = AdaptedLinear(linear(), adapter, scale, frozenset({"lora_B"}), corrected=True)
    full = nn.Parameter(layer.base.weight + adapter.dense(scale))
    target = numbers(40, OUT, seed=9)
    for start in (0, 20):  # accumulated over two passes
        part = slice(start, start + 20)
        (layer(x[part]) - target[part]).square().sum().backward()
        (nn.functional.linear(x[part], full, layer.base.bias) - target[part]).square().sum().backward()
    down = scale * adapter.right_RI.double().numpy()
    wanted = np.linalg.lstsq(down.T, full.grad.double().numpy().T, rcond=None)[0].T
    assert np.allclose(
        layer.factor("lora_B").grad.numpy(), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max()
    )
