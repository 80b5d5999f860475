"""Adapters are injected if all of them fit, or not at all."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from svdconvert.errors import ArtifactError
from svdconvert.linalg.factors import Factors
from svdconvert.training.model.adapted_linear import AdaptedLinear
from svdconvert.training.model.inject import extract_factors, inject_adapters, trainable_count

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
BOTH = frozenset({"lora_A", "lora_B"})
MakeModel = Callable[..., LlamaForCausalLM]


def factors(out: int, into: int, rank: int = 2, core: tuple[int, ...] | None = None) -> Factors:
    generator = torch.Generator().manual_seed(out + into)
    left, right = torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)
    return Factors(left, right, torch.ones(core) if core else None)


PIECES = {Q: (factors(32, 32), 0.5), DOWN: (factors(32, 48, rank=3), 1.0)}


def test_adapters_are_injected_and_everything_else_is_frozen(make_model: MakeModel) -> None:
    model = make_model()
    inject_adapters(model, PIECES, BOTH, dropout=0.1)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}
    assert layers.keys() == PIECES.keys()
    assert (layers[Q].scale, layers[Q].dropout.p) == (0.5, 0.1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(f"{path}.{piece}" for path in PIECES for piece in BOTH)
    assert trainable_count(model) == 2 * (32 + 32) + 3 * (32 + 48)


def test_a_model_with_adapters_computes_the_same_as_the_merged_one(make_model: MakeModel) -> None:
    ids = torch.arange(12).reshape(2, 6)
    merged, adapted = make_model(), make_model()
    for path, (piece, scale) in PIECES.items():
        merged.get_submodule(path).weight.data.add_(piece.dense(scale))
    inject_adapters(adapted, PIECES, BOTH)
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits)
    assert not torch.allclose(adapted(ids).logits, make_model()(ids).logits, atol=1e-3)


def test_extracting_is_the_inverse_of_injecting(make_model: MakeModel) -> None:
    model = make_model()
    inject_adapters(model, PIECES, BOTH)
    got = extract_factors(model)
    assert got.keys() == PIECES.keys()
    for path, (piece, _) in PIECES.items():
        assert torch.equal(got[path].left_OR, piece.left_OR)
        assert torch.equal(got[path].right_RI, piece.right_RI)


def test_one_error_lists_every_misfit_and_the_model_is_unchanged(make_model: MakeModel) -> None:
    model = make_model()
    wrong = {
        **PIECES,
        "model.layers.7.mlp.up_proj": (factors(48, 32), 1.0),
        "model.layers.0.mlp": (factors(48, 32), 1.0),
        "model.layers.0.mlp.up_proj": (factors(32, 48), 1.0),
        "model.layers.0.mlp.gate_proj": (Factors(torch.ones(48, 2), torch.ones(3, 32), torch.ones(3)), 1.0),
    }
    with pytest.raises(ArtifactError) as raised:
        inject_adapters(model, wrong, BOTH)
    assert str(raised.value).split("\n  ") == [
        "the adapter does not fit the model:",
        "model.layers.7.mlp.up_proj: the model has no such module",
        "model.layers.0.mlp: is not a linear layer but LlamaMLP",
        "model.layers.0.mlp.up_proj: lora_A is (2, 48) instead of (2, 32), "
        "lora_B is (32, 2) instead of (48, 2)",
        "model.layers.0.mlp.gate_proj: lora_A is (3, 32) instead of (2, 32), lora_S is (3,) instead of (2,)",
    ]
    assert extract_factors(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_missing_factor_that_is_to_be_trained_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ArtifactError, match=f"{Q}: there is no lora_S to train"):
        inject_adapters(make_model(), {Q: PIECES[Q]}, frozenset({"lora_S"}))


def test_an_adapter_without_layers_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ArtifactError, match="it has no layer"):
        inject_adapters(make_model(), {}, BOTH)


def test_injecting_twice_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    inject_adapters(model, PIECES, BOTH)
    with pytest.raises(ArtifactError, match=f"{Q}: is not a linear layer but AdaptedLinear"):
        inject_adapters(model, PIECES, BOTH)


def test_a_layer_that_two_paths_share_is_adapted_under_each() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    inject_adapters(model, {"a": (factors(4, 4), 1.0), "b": (factors(4, 4), 1.0)}, BOTH)
    assert extract_factors(model).keys() == {"a", "b"}
