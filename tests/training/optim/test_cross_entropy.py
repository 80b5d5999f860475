"""The sums are torch's cross entropy, in value and gradient, with or without the logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from svdconvert.training.optim import cross_entropy as module
from svdconvert.training.optim.cross_entropy import head_cross_entropy, summed_cross_entropy


@pytest.mark.parametrize("tokens", [0, 1, 16, 41])
def test_value_and_gradient_of_the_cross_entropy_are_those_of_torch(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, 300, generator=generator).mul_(5.0).requires_grad_()
    wanted = torch.randint(300, (tokens,), generator=generator)
    exact = logits.detach().double().requires_grad_()
    (0.3 * cross_entropy(exact, wanted, reduction="sum")).backward()
    loss = 0.3 * summed_cross_entropy(logits, wanted)
    loss.backward()
    torch.testing.assert_close(
        loss.double(), 0.3 * cross_entropy(exact, wanted, reduction="sum"), rtol=1e-6, atol=0.0
    )
    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_bfloat16_logits_are_summed_in_float32_and_get_bfloat16_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 1000, generator=generator).mul_(3.0).bfloat16().requires_grad_()
    wanted = torch.randint(1000, (40,), generator=generator)
    loss = summed_cross_entropy(logits, wanted)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    true = cross_entropy(exact, wanted, reduction="sum")
    true.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), true, rtol=1e-6, atol=0.0)
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    # Half a last place of bfloat16.
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-8, atol=1e-12)


def test_nothing_is_saved_if_no_gradient_is_needed() -> None:
    logits, wanted = torch.randn(20, 50), torch.randint(50, (20,))
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: pytest.fail("kept"), lambda kept: kept):
        loss = summed_cross_entropy(logits, wanted)
    torch.testing.assert_close(loss, cross_entropy(logits, wanted, reduction="sum"))


@pytest.mark.parametrize("tokens", [0, 1, 16, 41])
@pytest.mark.parametrize("most", [1, 300 * 40, 300 * 1000])
def test_a_head_in_parts_has_the_value_and_the_gradient_of_its_logits(
    tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGITS_ON_CPU", most)
    generator = torch.Generator().manual_seed(tokens)
    weight, bias = torch.randn(300, 12, generator=generator), torch.randn(300, generator=generator)
    hidden = torch.randn(tokens, 12, generator=generator).requires_grad_()
    wanted = torch.randint(300, (tokens,), generator=generator)
    for given in (bias, None):
        exact = hidden.detach().double().requires_grad_()
        logits = linear(exact, weight.double(), None if given is None else given.double())
        true = 0.3 * cross_entropy(logits, wanted, reduction="sum")
        true.backward()
        hidden.grad = None
        loss = 0.3 * head_cross_entropy(hidden, weight, given, wanted)
        loss.backward()
        torch.testing.assert_close(loss.double(), true, rtol=1e-6, atol=0.0)
        assert hidden.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_head_in_parts_saves_one_tensor_of_the_size_of_its_input() -> None:
    hidden = torch.randn(64, 8).bfloat16().requires_grad_()
    weight, wanted = torch.randn(500, 8).bfloat16(), torch.randint(500, (64,))
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: saved.append(tuple(kept.shape)) or kept, lambda kept: kept
    ):
        head_cross_entropy(hidden, weight, None, wanted).backward()
    assert saved == [(64, 8)]
