"""Each operator leads to the optimum of float64 LAPACK, or says that it cannot."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from svdconvert.linalg import truncated
from svdconvert.linalg.blocks import total_energy
from svdconvert.linalg.operators import GramMatrix, Operator, Sweeps
from svdconvert.linalg.truncated import fast_top
from tests.linalg.spectra import SHAPES, SPECTRA, matrix, truth, well_formed

RANK = 16
UNCLEAR = {"steep", "deficient", "power"}
"""Spectra whose smallest kept square, or energy outside, a float32 Gram matrix does not hold."""


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Search as on a GPU; the operators that were tried."""
    types: list[type] = []

    def as_on_a_gpu(weight_LS: Tensor, total: float, tol: float) -> Iterator[Operator]:
        for operator in (GramMatrix.of(weight_LS, total, bfloat16=False), Sweeps(weight_LS, total)):
            types.append(type(operator))
            yield operator

    monkeypatch.setattr(truncated, "_operators", as_on_a_gpu)
    return types


@pytest.mark.parametrize(("tol", "scale"), [(1e-2, 1.0), (1e-3, 1e-6), (1e-3, 1e5), (1e-4, 1.0)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*SPECTRA, "trained"])
def test_a_search_with_the_gram_matrix_is_as_good_as_its_tolerance(
    kind: str, shape: tuple[int, int], tol: float, scale: float, tried: list[type]
) -> None:
    generator = torch.Generator().manual_seed(1)
    found = fast_top(matrix(kind, *shape) * scale, RANK, tol=tol, generator=generator)
    assert found is not None
    assert truth(kind, *shape).excess(found, scale) < tol
    assert well_formed(found, shape, RANK)
    if kind not in UNCLEAR:
        assert tried == [GramMatrix]
    if kind in {"steep", "deficient"}:
        assert tried == [GramMatrix, Sweeps]


@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
def test_the_estimate_with_the_gram_matrix_is_close_to_the_true_excess(
    rank: int, tol: float, tried: list[type]
) -> None:
    shape = (640, 512)
    found = fast_top(matrix("trained", *shape), rank, tol=tol, generator=torch.Generator().manual_seed(1))
    assert found is not None and tried == [GramMatrix]
    assert found.spectrum.excess is not None and found.spectrum.excess < tol
    true = truth("trained", *shape).excess(found)
    assert 0.7 * true - 2e-6 < found.spectrum.excess < 4 * max(true, 0.0) + 2e-6


def test_the_gram_matrix_is_the_operator_of_the_sweeps() -> None:
    weight = matrix("trained", 320, 200)
    total = total_energy(weight)
    block = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    wanted = weight.double().T @ (weight.double() @ block.double()) / weight.double().square().sum()
    for operator in (GramMatrix.of(weight, total, bfloat16=False), Sweeps(weight, total)):
        error = (operator.apply(block).double() - wanted).norm() / wanted.norm()
        assert error < 1e-6
