"""Cross entropy a few tokens at a time: torch's own, value and gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from svdconvert.training.optim.crossentropy import summed_cross_entropy


@pytest.mark.parametrize("tokens", [0, 1, 16, 41])
def test_value_and_gradient_are_torchs(tokens: int) -> None:
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


def test_half_logits_are_summed_in_float32_and_get_half_gradients() -> None:
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


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    logits, wanted = torch.randn(20, 50), torch.randint(50, (20,))
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: pytest.fail("kept"), lambda kept: kept):
        loss = summed_cross_entropy(logits, wanted)
    torch.testing.assert_close(loss, cross_entropy(logits, wanted, reduction="sum"))
