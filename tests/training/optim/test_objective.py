"""The loss is torch's cross entropy, in value and gradient, and only positions in the loss get logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.optim.objective import summed_cross_entropy
from tests.training.small_runs import OPTIONS, MakeModel, adapted, losses, run


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


def test_a_model_with_an_unknown_head_gets_the_same_loss(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = run(adapted(make_model()))
    original = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any) -> Any:
        return original(self, input_ids=input_ids)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    assert losses(run(adapted(make_model()))) == pytest.approx(losses(chosen), rel=1e-5)


def test_only_positions_with_loss_get_logits(make_model: MakeModel) -> None:
    model, seen = adapted(make_model()), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    row = Example(torch.arange(8, dtype=torch.int32), torch.tensor([IGNORED] * 6 + [6, 7], dtype=torch.int32))
    run(model, replace(OPTIONS, steps=1), train=[row])
    assert seen == [2]


def test_the_padding_token_does_not_change_the_loss(make_model: MakeModel) -> None:
    first, second = run(adapted(make_model()), pad_id=0), run(adapted(make_model()), pad_id=5)
    assert losses(first) == losses(second)
