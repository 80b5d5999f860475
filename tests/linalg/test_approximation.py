"""Approximations by a rule reach the optimum of LAPACK in float64, with a measured error."""

import numpy as np
import pytest
import torch

from svdconvert.linalg.approximation import of_rank, within
from svdconvert.linalg.spectrum import effective_rank, rank_for_energy, squares_of, stable_rank


def matrix(rows: int, columns: int, decay: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    left, right = (
        torch.linalg.qr(torch.randn(side, min(rows, columns), generator=generator)).Q
        for side in (rows, columns)
    )
    sigma = torch.arange(1, min(rows, columns) + 1).float() ** -decay
    return left * sigma @ right.T


def norm_of(whole: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(whole.double()))


@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (500, 500), (192, 576)])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("rank", [8, 32])
def test_an_approximation_is_as_good_as_lapacks(shape: tuple[int, int], decay: float, rank: int) -> None:
    """From bfloat16 if the processor multiplies that faster and the spectrum allows it."""
    whole = matrix(*shape, decay)
    best = np.linalg.svd(whole.double().numpy(), compute_uv=False)[rank:]
    found = of_rank(whole, norm_of(whole), rank, "x")
    rest = torch.linalg.vector_norm(whole.double() - found.left_OR.double() @ found.right_RI.double())
    assert float(rest) <= np.linalg.norm(best) * (1 + 5e-4)
    assert found.rest == pytest.approx(float(rest), rel=5e-6)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (40, 40), (700, 500)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_the_rank_is_the_smallest_within_the_tolerance(shape: tuple[int, int], decay: float) -> None:
    whole = matrix(*shape, decay)
    norm = norm_of(whole)
    sigma = np.linalg.svd(whole.double().numpy(), compute_uv=False)
    lost = np.sqrt((sigma[::-1] ** 2).cumsum())[::-1] / np.linalg.norm(sigma)
    for share in (0.9, 0.5, 0.1):
        found = within(whole, norm, share, "x")
        wanted = int((lost > share).sum())
        # The randomised engine may exceed the optimum slightly.
        assert wanted <= len(found.sigma_R) <= wanted + 1
        rest = torch.linalg.vector_norm(whole.double() - found.left_OR.double() @ found.right_RI.double())
        assert float(rest) == pytest.approx(found.rest, rel=1e-4, abs=1e-6 * norm)
        assert float(rest) <= share * norm * (1 + 1e-6)


def test_a_matrix_of_low_rank_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(300, 7, generator=generator) @ torch.randn(7, 400, generator=generator)
    found = within(whole, norm_of(whole), 1e-4, "x")
    assert len(found.sigma_R) == 7


def test_a_rank_above_the_matrix_own_is_its_own() -> None:
    whole = matrix(30, 20, 0.5)
    assert len(of_rank(whole, norm_of(whole), 99, "x").sigma_R) == 20


def test_a_truncation_has_the_error_that_is_measured() -> None:
    whole = matrix(300, 200, 0.5)
    cut = of_rank(whole, norm_of(whole), 40, "x").truncated(10)
    rest = torch.linalg.vector_norm(whole.double() - cut.left_OR.double() @ cut.right_RI.double())
    assert cut.rest == pytest.approx(float(rest), rel=1e-4)


@pytest.mark.parametrize("shape", [(300, 200), (1500, 1100)])
def test_the_numbers_of_a_spectrum_are_lapacks(shape: tuple[int, int]) -> None:
    whole = matrix(*shape, 0.5)
    squares = np.linalg.svd(whole.double().numpy(), compute_uv=False) ** 2
    found = squares_of(whole, float(squares.sum()))
    assert np.allclose(found.numpy(), squares, atol=1e-5 * squares[0])
    assert stable_rank(found) == pytest.approx(squares.sum() / squares[0], rel=1e-4)
    shares = squares / squares.sum()
    assert effective_rank(found) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert rank_for_energy(found, 0.9) == int((shares.cumsum() < 0.9).sum()) + 1


def test_a_zero_matrix_has_no_rank() -> None:
    zeros = squares_of(torch.zeros(5, 4), 0.0)
    assert stable_rank(zeros) == effective_rank(zeros) == rank_for_energy(zeros, 0.9) == 0
