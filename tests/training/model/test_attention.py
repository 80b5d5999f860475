"""The options choose the attention; by default short rows in bfloat16 on a CPU get blocks."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from svdconvert.errors import RecipeError
from svdconvert.training.model.attention import chosen_attention
from svdconvert.training.model.blockwise_attention import NAME
from svdconvert.training.optim.accelerator import make_accelerator
from svdconvert.training.optim.loop import StepLog
from tests.training.small_runs import OPTIONS, adapted, run

MakeModel = Callable[..., LlamaForCausalLM]


def watched(model: LlamaForCausalLM) -> list[str]:
    """Names of the attentions that a forward pass is computed with."""
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    return seen


@pytest.mark.parametrize(
    ("precision", "max_length", "wanted"),
    [("bf16", 512, NAME), ("bf16", 513, "sdpa"), ("fp32", 512, "sdpa")],
)
def test_auto_attention_depends_on_precision_and_max_length(
    precision: str, max_length: int, wanted: str, make_model: MakeModel
) -> None:
    model = adapted(make_model())
    seen = watched(model)
    run(model, replace(OPTIONS, steps=2, precision=precision, max_length=max_length))
    assert set(seen) == {wanted}
    assert model.config._attn_implementation == "sdpa", "the model is not as it was"


def test_either_attention_gives_the_same_losses(make_model: MakeModel) -> None:
    losses = []
    for max_length in (512, 513):
        logs = run(adapted(make_model()), replace(OPTIONS, precision="bf16", max_length=max_length))
        losses.append([log.loss for log in logs if isinstance(log, StepLog)])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_auto_attention_is_the_models_own_on_a_gpu(make_model: MakeModel) -> None:
    model = make_model()
    gpu: Any = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16")
    with chosen_attention(model, replace(OPTIONS, precision="bf16"), gpu):
        assert model.config._attn_implementation == "sdpa"


def test_auto_attention_keeps_any_attention_but_sdpa(make_model: MakeModel) -> None:
    model = adapted(make_model())
    model.set_attn_implementation("flex_attention")
    seen = watched(model)
    with pytest.raises(ZeroDivisionError):
        model.register_forward_pre_hook(lambda *_: 1 // 0)  # flex attention itself needs a GPU
        run(model, replace(OPTIONS, precision="bf16"))
    assert seen == ["flex_attention"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_named_attention_is_used_and_the_models_own_restored(attention: str, make_model: MakeModel) -> None:
    model = adapted(make_model())
    seen = watched(model)
    run(model, replace(OPTIONS, steps=1, precision="bf16", attention=attention))
    assert set(seen) == {attention}
    assert model.config._attn_implementation == "sdpa"


def test_a_named_attention_is_refused_for_a_model_without_a_choice(make_model: MakeModel) -> None:
    class Network(nn.Module):
        """A model that is not one of transformers'."""

    with (
        pytest.raises(RecipeError, match="Network has no choice of attentions: leave attention at auto"),
        chosen_attention(Network(), replace(OPTIONS, attention="eager"), make_accelerator(OPTIONS)),
    ):
        pass
