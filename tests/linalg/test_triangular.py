"""Triangular solves and Cholesky in panels, against numpy in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from svdconvert.linalg import triangular
from svdconvert.linalg.triangular import Triangular

ORDERS = (1, 7, 8, 9, 30)


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangular, "_PANEL", 8)


def positive(order: int) -> Tensor:
    wide = torch.randn(3 * order, order, generator=torch.Generator().manual_seed(order))
    return wide.T @ wide / (3 * order)


def error(found: Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.numpy() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("order", ORDERS)
def test_both_solves_are_those_of_the_matrix(order: int) -> None:
    lower = torch.linalg.cholesky(positive(order))
    block = torch.randn(order, 3, generator=torch.Generator().manual_seed(0))
    given = block.clone()
    above = torch.ones(order, order, dtype=torch.bool).triu(1)
    factor = Triangular.of(lower.masked_fill(above, 1e30))
    wide = lower.double().numpy()
    assert error(factor.solve(block), np.linalg.solve(wide, block.double().numpy())) < 2e-6
    assert error(factor.solve_transposed(block), np.linalg.solve(wide.T, block.double().numpy())) < 2e-6
    assert torch.equal(block, given)


@pytest.mark.parametrize("order", ORDERS)
def test_cholesky_solves_with_the_matrix_it_was_given(order: int) -> None:
    gram = positive(order)
    block = torch.randn(order, 3, generator=torch.Generator().manual_seed(0))
    wanted = np.linalg.solve(gram.double().numpy(), block.double().numpy())
    factor = Triangular.cholesky(gram)
    assert factor is not None
    assert error(factor.solve_transposed(factor.solve(block)), wanted) < 2e-5


@pytest.mark.parametrize("place", [0, 7, 8, 29])
def test_a_matrix_that_is_not_positive_has_none(place: int) -> None:
    gram = positive(30)
    gram[place, place] = -1.0
    assert Triangular.cholesky(gram) is None
