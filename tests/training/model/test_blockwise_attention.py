"""Attention by blocks is torch's attention, in value and gradient, and saves only its inputs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from svdconvert.training.data.packing import pack_examples
from svdconvert.training.model import blockwise_attention as module
from svdconvert.training.model.blockwise_attention import (
    NAME,
    attention_forward,
    blockwise_attention,
    register_blockwise_attention,
)
from svdconvert.training.optim.objective import NextToken
from tests import tiny
from tests.conftest import Build
from tests.training.small_runs import examples

TOKENS = 75
CAUSAL = tiny.CAUSAL


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries of 6 heads of 5, keys and values of 2 heads of 5 and 7; two rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, TOKENS, 6, 5), (2, TOKENS, 2, 5), (2, TOKENS, 2, 7))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in made]


def packed_mask() -> Tensor:
    """Causal, and rows that are packed do not attend to each other: (2, 1, T, T)."""
    starts = torch.zeros(2, TOKENS, dtype=torch.long)
    starts[0, [30, 31, 60]] = 1
    starts[1, [70]] = 1
    number = starts.cumsum(1)
    return ((number[:, :, None] == number[:, None]) & torch.ones(TOKENS, TOKENS).tril().bool())[:, None]


def with_gradients(attention: Any, given: list[Tensor]) -> list[Tensor]:
    """The output (B, T, H, E), and the gradients of a weighted sum of it."""
    out = attention(*given)
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), given)]


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "packed", "one mask for all rows"])
def test_output_and_gradients_are_those_of_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORES", 1)  # several blocks
    mask = packed_mask() if kind == "packed" else packed_mask()[:1] if kind.startswith("one") else None
    causal = kind == "causal"

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return blockwise_attention(query, key, value, mask, 0.4, is_causal=causal)

    def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=0.4, is_causal=causal, enable_gqa=True
        ).transpose(1, 2)

    for own, wanted in zip(with_gradients(ours, inputs()), with_gradients(torchs, inputs()), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-12)


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_those_of_the_inputs() -> None:
    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return blockwise_attention(query, key, value, None, 0.4, is_causal=True)

    found = with_gradients(ours, inputs(torch.float32))
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, *[torch.float32] * 3]
    exact = with_gradients(
        lambda query, key, value: blockwise_attention(query, key, value, None, 0.4, is_causal=True), inputs()
    )
    for own, wanted in zip(found, exact, strict=True):
        assert (own.double() - wanted).norm() < 0.01 * wanted.norm()


def test_only_the_inputs_are_saved() -> None:
    saved: list[int] = []
    given = inputs(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: saved.append(kept.data_ptr()) or kept, lambda kept: kept
    ):
        blockwise_attention(*given, None, 0.4, is_causal=True)
    assert saved == [tensor.data_ptr() for tensor in given]


def test_a_row_without_any_key_gives_finite_numbers() -> None:
    mask = torch.zeros(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    mask[:, :, 10:, 10:] = True
    found = with_gradients(
        lambda query, key, value: blockwise_attention(query, key, value, mask, 0.4, is_causal=False), inputs()
    )
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize(
    "arguments",
    [
        {"position_bias": torch.ones(1, 6, TOKENS, TOKENS)},
        {"dropout": 0.5},
        {"attention_mask": torch.zeros(2, 1, TOKENS, TOKENS)},
    ],
)
def test_what_it_does_not_compute_is_left_to_sdpa(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        lambda *given, **named: seen.append(named) or (given[1], None),
    )
    given = dict(zip(("query", "key", "value"), inputs(torch.float32), strict=True))
    layer: Any = SimpleNamespace(is_causal=True, num_key_value_groups=3)
    attention_forward(layer, **given, **{"attention_mask": None, **arguments})
    assert len(seen) == 1


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("packing", [False, True])
def test_every_family_has_the_loss_that_it_has_with_its_own_attention(
    model_type: str, packing: bool, checkpoint: Build
) -> None:
    register_blockwise_attention()
    model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type, dtype=torch.float32)).eval()
    rows = pack_examples(examples(5), 24) if packing else examples(5)
    batch = NextToken(0).batch(rows)
    if model.config._attn_implementation != "sdpa":
        pytest.skip("its attention is not replaced")
    with torch.no_grad():
        wanted = NextToken(0).loss_sum(model, model, batch)
        model.set_attn_implementation(NAME)
        torch.testing.assert_close(NextToken(0).loss_sum(model, model, batch), wanted, rtol=1e-5, atol=0.0)
