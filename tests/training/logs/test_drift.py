"""Drift is what numpy says of the products before and after."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from svdconvert.linalg.factors import Factors
from svdconvert.training.logs.drift import measure_drift
from svdconvert.training.model.inject import inject_adapters

TRIPLE, PAIR = frozenset({"lora_A", "lora_B", "lora_S"}), frozenset({"lora_A", "lora_B"})


def start() -> Factors:
    left, sigma, right = torch.linalg.svd(
        torch.randn(9, 7, generator=torch.Generator().manual_seed(0)), full_matrices=False
    )
    return Factors(left[:, :3], right[:3], sigma[:3])


def installed(factors: Factors, trains: frozenset[str]) -> nn.Module:
    model = nn.ModuleDict({"q": nn.Linear(7, 9)})
    inject_adapters(model, {"q": (factors, 2.0)}, trains)
    return model


def as_pair(factors: Factors) -> Factors:
    return Factors(*factors.folded())


@pytest.mark.parametrize("trains", [TRIPLE, PAIR], ids=["three factors", "two factors"])
def test_the_drift_of_the_initial_factors_is_zero(trains: frozenset[str]) -> None:
    factors = start() if trains == TRIPLE else as_pair(start())
    found = measure_drift(installed(factors, trains), {"q": factors}, 0)
    assert max(abs(found.sigma_drift), abs(found.u_rotation), abs(found.v_rotation)) < 1e-5


@pytest.mark.parametrize("trains", [TRIPLE, PAIR], ids=["three factors", "two factors"])
def test_the_drift_agrees_with_numpys_svd(trains: frozenset[str]) -> None:
    before = start()
    turned = torch.linalg.qr(before.left_OR + 0.1 * noise(9, 3, 1)).Q
    turned = turned * (turned * before.left_OR).sum(0).sign()  # no sign flips: those are nobody's
    after = Factors(turned, before.right_RI, before.core + torch.tensor([0.3, -0.1, 0.2]))
    given = (before, after) if trains == TRIPLE else (as_pair(before), as_pair(after))
    found = measure_drift(installed(given[1], trains), {"q": given[0]}, 5)
    u0, s0, v0 = np.linalg.svd(before.dense(1.0).double().numpy())
    u1, s1, v1 = np.linalg.svd(after.dense(1.0).double().numpy())
    assert found.step == 5
    assert found.sigma_drift == pytest.approx(2.0 * np.abs(s1[:3] - s0[:3]).mean(), rel=1e-4)
    cosines = [abs(u1[:, k] @ u0[:, k]) for k in range(3)], [abs(v1[k] @ v0[k]) for k in range(3)]
    assert found.u_rotation == pytest.approx(1 - np.mean(cosines[0]), abs=1e-5)
    assert found.v_rotation == pytest.approx(1 - np.mean(cosines[1]), abs=1e-5)


def noise(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
