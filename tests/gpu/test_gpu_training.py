"""Training on a GPU follows the CPU."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.training.small_runs import OPTIONS, adapted, losses, run, weights


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_losses_are_those_of_the_cpu(recompute: bool) -> None:
    wanted = losses(run(adapted(model())))
    options = replace(OPTIONS, device="cuda", gradient_checkpointing=recompute)
    found = losses(run(adapted(model()), options))
    assert found == pytest.approx(wanted, rel=1e-3)


def test_bf16_autocast_learns_and_repeats_itself() -> None:
    options = replace(OPTIONS, device="cuda", precision="auto", steps=12)
    first, second = (adapted(model()) for _ in range(2))
    found = losses(run(first, options))
    assert found[-1] < found[0]
    assert losses(run(second, options)) == found
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_adamw_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    real = torch.optim.AdamW.__init__

    def record(self: torch.optim.AdamW, *arguments: object, **options: object) -> None:
        made.append(bool(options.get("fused")))
        real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.AdamW, "__init__", record)
    run(adapted(model()), replace(OPTIONS, device="cuda"))
    assert made == [True]
