"""Short rows in bfloat16 on a CPU go through plain matrix products; nothing else is touched."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from transformers import LlamaForCausalLM

from svdconvert.training.optim.loop import StepLog
from tests.training.optim.test_loop import PLAN, adapted, run

MakeModel = Callable[..., LlamaForCausalLM]


def watched(model: LlamaForCausalLM) -> list[str]:
    """Names of the attentions that a forward pass is computed with."""
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    return seen


@pytest.mark.parametrize(
    ("precision", "max_length", "wanted"),
    [("bf16", 512, "eager"), ("bf16", 513, "sdpa"), ("fp32", 512, "sdpa")],
)
def test_the_plan_decides_on_the_attention(
    precision: str, max_length: int, wanted: str, make_model: MakeModel
) -> None:
    model = adapted(make_model())
    seen = watched(model)
    run(model, replace(PLAN, steps=2, precision=precision, max_length=max_length))
    assert set(seen) == {wanted}
    assert model.config._attn_implementation == "sdpa", "the model is not as it was"


def test_either_attention_gives_the_same_losses(make_model: MakeModel) -> None:
    losses = []
    for max_length in (512, 513):
        logs = run(adapted(make_model()), replace(PLAN, precision="bf16", max_length=max_length))
        losses.append([log.loss for log in logs if isinstance(log, StepLog)])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_another_attention_than_the_usual_one_is_kept(make_model: MakeModel) -> None:
    model = adapted(make_model())
    model.set_attn_implementation("flex_attention")
    seen = watched(model)
    with pytest.raises(ZeroDivisionError):
        model.register_forward_pre_hook(lambda *_: 1 // 0)  # flex attention itself wants a GPU
        run(model, replace(PLAN, precision="bf16"))
    assert seen == ["flex_attention"]
