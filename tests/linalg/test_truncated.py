"""Truncated decompositions against float64 LAPACK."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from svdconvert.linalg.solver import Solver
from svdconvert.linalg.truncated import Triplets, exact_top, fast_top

RANK = 16
SHAPES = [(300, 200), (150, 400), (256, 256)]
SPECTRA = ("flat", "slow", "power", "steep", "clustered", "deficient", "random")


def singular_values(kind: str, count: int) -> NDArray[np.float64]:
    k = np.arange(1.0, count + 1)
    return {
        "flat": np.ones(count),
        "slow": 1 / np.sqrt(k),
        "power": 1 / k,
        "steep": 0.7**k,
        "clustered": np.where(k <= 20, 10.0, np.where(k <= 60, 1.0, 0.01)),
        "deficient": np.where(k <= 10, 1 / k, 0.0),
    }[kind]


@cache
def matrix(kind: str, rows: int, columns: int) -> Tensor:
    """A float32 matrix with the spectrum `kind`."""
    draw = np.random.default_rng(rows + columns).standard_normal
    if kind == "random":
        return torch.tensor(draw((rows, columns)), dtype=torch.float32)
    count = min(rows, columns)
    left = np.linalg.qr(draw((rows, count)))[0]
    right = np.linalg.qr(draw((columns, count)))[0]
    return torch.tensor((left * singular_values(kind, count)) @ right.T, dtype=torch.float32)


@dataclass
class Truth:
    """What float64 LAPACK says of the rank-R truncation of `weight`."""

    weight: Tensor
    rank: int = RANK

    @cached_property
    def sigma(self) -> NDArray[np.float64]:
        return np.linalg.svd(self.weight.double().numpy(), compute_uv=False)

    def excess(self, found: Triplets, scale: float = 1.0) -> float:
        """Residual's norm over the optimal one, minus one; where that is noise, the residual's relative norm.

        `found` is of `scale` times the matrix.
        """
        product = found.left_OR.double() * (found.sigma_R.double() / scale) @ found.right_RI.double()
        residual = float(torch.linalg.vector_norm(self.weight.double() - product))
        optimum, whole = np.linalg.norm(self.sigma[self.rank :]), np.linalg.norm(self.sigma)
        return residual / optimum - 1 if optimum > 1e-5 * whole else residual / whole


@cache
def truth(kind: str, rows: int, columns: int) -> Truth:
    return Truth(matrix(kind, rows, columns))


def fast(weight: Tensor, tol: float, seed: int = 1) -> Triplets:
    found = fast_top(weight, RANK, tol=tol, generator=torch.Generator().manual_seed(seed))
    assert found is not None
    return found


def orthonormal(columns: Tensor) -> bool:
    gram = columns.double().T @ columns.double()
    return bool((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-5)


@pytest.mark.parametrize(("tol", "scale"), [(1e-2, 1.0), (1e-3, 1e-6), (1e-3, 1e5), (1e-4, 1.0)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_the_fast_engine_is_as_good_as_its_tolerance(
    kind: str, shape: tuple[int, int], tol: float, scale: float
) -> None:
    weight = matrix(kind, *shape) * scale
    found = fast(weight, tol)
    assert truth(kind, *shape).excess(found, scale) < tol
    assert orthonormal(found.left_OR) and orthonormal(found.right_RI.T)
    assert (found.sigma_R[:-1] >= found.sigma_R[1:]).all()
    assert (found.left_OR.shape[1], found.sigma_R.shape, found.right_RI.shape[0]) == (RANK, (RANK,), RANK)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_singular_values_are_right(kind: str, shape: tuple[int, int]) -> None:
    weight = matrix(kind, *shape)
    wanted = truth(kind, *shape).sigma[:RANK]
    assert np.abs(fast(weight, 1e-4).sigma_R.numpy() - wanted).max() < 3e-3 * wanted[0]
    assert np.abs(exact_top(weight, RANK).sigma_R.numpy() - wanted).max() < 2e-6 * wanted[0]


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["slow", "power", "random"])
def test_the_estimated_excess_is_of_the_true_ones_size(kind: str, shape: tuple[int, int], tol: float) -> None:
    weight = matrix(kind, *shape)
    found = fast(weight, tol)
    assert found.spectrum.excess < tol
    true = truth(kind, *shape).excess(found)
    assert true / 1.5 - 1e-9 < found.spectrum.excess < 8 * true + 1e-9


@pytest.mark.parametrize("kind", SPECTRA)
def test_what_is_recorded_of_the_spectrum_is_true(kind: str) -> None:
    weight = matrix(kind, 300, 200)
    sigma = truth(kind, 300, 200).sigma
    for found, engine in ((fast(weight, 1e-4), "fast"), (exact_top(weight, RANK), "exact")):
        spectrum = found.spectrum
        assert spectrum.engine == engine
        assert spectrum.first == pytest.approx(sigma[0], rel=1e-3)
        assert spectrum.last == pytest.approx(sigma[RANK - 1], rel=3e-3, abs=1e-6)
        energy = (sigma[:RANK] ** 2).sum() / (sigma**2).sum()
        assert spectrum.energy == pytest.approx(energy, rel=1e-3)
    assert exact_top(weight, RANK).spectrum.excess == 0.0


def test_a_matrix_of_zeros_has_a_decomposition() -> None:
    for found in (fast(torch.zeros(300, 200), 1e-3), exact_top(torch.zeros(300, 200), RANK)):
        assert not found.sigma_R.any()
        assert orthonormal(found.left_OR) and orthonormal(found.right_RI.T)
        assert found.spectrum.energy == 1.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 300), (40, 3)])
@pytest.mark.parametrize("svd", ["fast", "exact"])
def test_narrow_matrices_are_decomposed_up_to_their_own_rank(shape: tuple[int, int], svd: str) -> None:
    weight = torch.randn(shape)
    rank = min(shape)
    found = Solver("w", svd).top(weight, rank)
    assert torch.allclose(found.left_OR * found.sigma_R @ found.right_RI, weight, atol=1e-5)
    assert found.left_OR.shape == (shape[0], rank) and found.right_RI.shape == (rank, shape[1])


def test_the_engine_is_lapack_where_it_is_asked_for_or_saves_time() -> None:
    weight = matrix("power", 300, 200)
    assert Solver("w", "fast").top(weight, RANK).spectrum.engine == "fast"
    assert Solver("w", "exact").top(weight, RANK).spectrum.engine == "exact"
    assert Solver("w", "fast").top(weight, 190).spectrum.engine == "exact"


def test_lapack_takes_over_where_the_tolerance_is_out_of_reach() -> None:
    weight = torch.eye(300) + 1e-3 * matrix("random", 300, 300)
    found = Solver("w", "fast", tol=1e-12).top(weight, RANK)
    assert found.spectrum.engine == "exact"
    assert Truth(weight).excess(found) < 1e-6


def test_the_same_seed_and_name_give_the_same_bits_whatever_ran_before() -> None:
    weight = matrix("slow", 300, 200)
    first = Solver("w", seed=3).top(weight, RANK)
    torch.manual_seed(99)
    torch.rand(7)
    before = torch.get_rng_state()
    again = Solver("w", seed=3).top(weight, RANK)
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    for one, other in zip((first.left_OR, first.sigma_R), (again.left_OR, again.sigma_R), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("other", [Solver("w", seed=4), Solver("v", seed=3)])
def test_another_seed_or_name_gives_other_random_numbers(other: Solver) -> None:
    weight = matrix("slow", 300, 200)
    assert not torch.equal(Solver("w", seed=3).top(weight, RANK).left_OR, other.top(weight, RANK).left_OR)
