"""SORSA's penalty is the one number that docs/adr/0007 defines, whatever else a step does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from svdconvert.config.train import TrainOptions
from svdconvert.linalg.factors import Factors
from svdconvert.training.data.example import Example
from svdconvert.training.model.adapted_linear import AdaptedLinear
from svdconvert.training.model.inject import inject_adapters
from svdconvert.training.optim.accelerator import make_accelerator
from svdconvert.training.optim.objective import NextToken
from svdconvert.training.optim.orthonormality import Penalty, penalty_weight
from svdconvert.training.optim.step import Trainer

ALL = frozenset({"lora_A", "lora_B", "lora_S"})


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(seed: int, core: bool = True, trains: frozenset[str] = ALL) -> AdaptedLinear:
    factors = Factors(numbers(9, 3, seed=seed), numbers(3, 7, seed=seed + 1), torch.ones(3) if core else None)
    return AdaptedLinear(nn.Linear(7, 9), factors, 0.5, trains if core else trains - {"lora_S"})


def value(model: nn.Module) -> float:
    """The mean of the unsquared norms in float64, by numpy."""
    norms = []
    for one in model:
        a, b = one.lora_A.detach().double().numpy(), one.lora_B.detach().double().numpy()
        norms += [np.linalg.norm(a @ a.T - np.eye(3)), np.linalg.norm(b.T @ b - np.eye(3))]
    return float(np.mean(norms))


def test_the_penalty_and_its_gradient_are_those_of_the_definition() -> None:
    model = nn.ModuleList([layer(0), layer(10)])
    found = Penalty(0.7).add_gradient(model)
    assert found == pytest.approx(value(model), rel=1e-5)
    for one in model:
        for name in ("lora_A", "lora_B"):
            piece = one.factor(name)
            assert piece.grad is not None
            for place in [(0, 0), (2, 1), (1, 2)]:  # central differences
                sides = []
                for step in (1e-3, -1e-3):
                    piece.data[place] += step
                    sides.append(value(model))
                    piece.data[place] -= step
                assert float(piece.grad[place]) == pytest.approx(
                    0.7 * (sides[0] - sides[1]) / 2e-3, rel=1e-2, abs=1e-4
                )
        assert one.factor("lora_S").grad is None


def test_the_gradient_is_added_and_is_finite_at_orthonormal_factors() -> None:
    model = nn.ModuleList([layer(0)])
    identity = Factors(torch.eye(9, 3), torch.eye(3, 7), torch.ones(3))
    still = nn.ModuleList([AdaptedLinear(nn.Linear(7, 9), identity, 1.0, ALL)])
    assert Penalty(1.0).add_gradient(still) == 0.0
    assert all(parameter.grad is None for parameter in still.parameters())
    Penalty(1.0).add_gradient(model)
    once = model[0].factor("lora_A").grad.clone()
    Penalty(1.0).add_gradient(model)
    torch.testing.assert_close(model[0].factor("lora_A").grad, 2 * once)


def test_only_trained_factors_of_adapters_with_singular_values_are_penalised() -> None:
    model = nn.ModuleList([layer(0, core=False), layer(5, trains=frozenset({"lora_A", "lora_S"}))])
    Penalty(1.0).add_gradient(model)
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {"1.lora_A"}


def test_the_reference_rule_is_the_published_scripts_effective_coefficient() -> None:
    published: dict[str, Any] = {"lr": 3e-5, "accumulate": 64, "penalty": 4e-4}
    assert penalty_weight(TrainOptions(**published, penalty_rule="reference")) == pytest.approx(
        0.2083, rel=1e-3
    )
    assert penalty_weight(TrainOptions(**published)) == 4e-4
    assert penalty_weight(TrainOptions()) == 0.0


def _rows(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 20, (9,), generator=generator, dtype=torch.int32) for _ in range(count)]
    return [Example(ids, ids.clone()) for ids in rows]


def _taken(model: LlamaForCausalLM, options: TrainOptions) -> dict[str, Tensor]:
    """The gradients that AdamW is given in one step of `options`."""
    pieces = {}
    for number, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            shape = (module.out_features, module.in_features)
            sides = numbers(shape[0], 4, seed=number), numbers(4, shape[1], seed=number + 99)
            pieces[path] = (Factors(*sides, torch.ones(4)), 0.01)
    inject_adapters(model, pieces, ALL)
    trainer = Trainer.prepare(model, NextToken(2), options, make_accelerator(options))
    trainer.optimizer.step = lambda: None
    trainer.optimizer.zero_grad = lambda: None
    stepped = trainer.step(_rows(4), 1e-3)
    assert (stepped.penalty is not None) == bool(options.penalty)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CIRCUMSTANCES: dict[str, dict[str, Any]] = {
    "one batch": {"batch_size": 4},
    "accumulated": {"batch_size": 1, "accumulate": 4},
    "clipped hard": {"batch_size": 4, "clip": 1e-4},
    "never clipped": {"batch_size": 4, "clip": 0.0},
    "another rate and schedule": {"batch_size": 4, "lr": 0.7, "schedule": "linear"},
    "bf16": {"batch_size": 4, "precision": "bf16"},
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_the_weight_of_the_penalty_is_the_same_however_a_step_is_computed(
    name: str, make_model: Callable[..., LlamaForCausalLM]
) -> None:
    values = {"lr": 1e-3, "steps": 1, "device": "cpu", "precision": "fp32"} | CIRCUMSTANCES[name]
    try:
        without, model = _taken(make_model(), TrainOptions(**values)), make_model()
        found = _taken(model, TrainOptions(**values, penalty=0.3))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    model.zero_grad()
    Penalty(0.3).add_gradient(model)
    own = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert {key.rpartition(".")[2] for key in own} == {"lora_A", "lora_B"}
    for key, gradient in found.items():
        wanted = without[key] + own[key] if key in own else without[key]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
