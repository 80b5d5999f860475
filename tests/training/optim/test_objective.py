"""Only positions in the loss get logits, and the loss is that of transformers in every family."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.optim.objective import NextToken
from tests import tiny
from tests.conftest import Build
from tests.training.small_runs import OPTIONS, MakeModel, adapted, examples, losses, run

CAUSAL = tiny.CAUSAL


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
    model, seen = adapted(make_model(tie_word_embeddings=False)), []
    model.lm_head.weight.requires_grad_(True)  # a head that is trained is not skipped
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    row = Example(torch.arange(8, dtype=torch.int32), torch.tensor([IGNORED] * 6 + [6, 7], dtype=torch.int32))
    run(model, replace(OPTIONS, steps=1), train=[row])
    assert seen == [2]


def test_the_padding_token_does_not_change_the_loss(make_model: MakeModel) -> None:
    first, second = run(adapted(make_model()), pad_id=0), run(adapted(make_model()), pad_id=5)
    assert losses(first) == losses(second)


def test_the_head_of_a_family_is_skipped_if_its_output_is_the_logits(checkpoint: Build) -> None:
    def skips(model_type: str) -> bool:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type, dtype=torch.float32))
        return NextToken(0).fitted_to(model.requires_grad_(False)).skips_head

    assert skips("llama")
    assert skips("gemma3_text")
    assert not skips("gemma2"), "the tanh after the head was not noticed"


@pytest.mark.parametrize("model_type", CAUSAL)
def test_loss_and_gradient_are_those_of_transformers(model_type: str, checkpoint: Build) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type, dtype=torch.float32)).eval()
    model.requires_grad_(False)
    batch = NextToken(0).batch(examples(3))
    objective = NextToken(0).fitted_to(model)
    tokens = sum(example.loss_tokens for example in examples(3))
    own, own_gradient = _with_gradient(model, lambda: objective.loss_sum(model, model, batch) / tokens)
    stock, stock_gradient = _with_gradient(model, lambda: model(**batch).loss)
    torch.testing.assert_close(own, stock, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(own_gradient, stock_gradient, rtol=1e-4, atol=1e-6)


def _with_gradient(model: PreTrainedModel, loss: Any) -> tuple[Tensor, Tensor]:
    """A loss, and its gradient with respect to the first norm of the language model."""
    norm = next(
        parameter
        for name, parameter in model.named_parameters()
        if "norm" in name and "layers" in name and "vision" not in name
    )
    norm.requires_grad_(True)
    norm.grad = None
    value = loss()
    value.backward()
    assert norm.grad is not None
    return value.detach(), norm.grad.clone()
