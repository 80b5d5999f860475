"""The top slice against float64 LAPACK."""

import numpy as np
import pytest
import torch

from svdconvert.linalg import solver, threads, truncated
from svdconvert.linalg.exact import exact_top
from svdconvert.linalg.krylov import space_needed
from svdconvert.linalg.operators import LowSweeps, Sweeps
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.triplets import Triplets
from svdconvert.linalg.truncated import fast_top, gram_top
from tests.linalg.spectra import SHAPES, SPECTRA, Truth, matrix, truth, well_formed

RANK = 16
NOISE = 2e-6  # an excess that float32 makes itself


def fast(weight: torch.Tensor, tol: float, seed: int = 1, rank: int = RANK) -> Triplets:
    found = fast_top(weight, rank, tol=tol, generator=torch.Generator().manual_seed(seed))
    assert found is not None
    return found


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor claims to multiply bfloat16 faster."""
    monkeypatch.setattr(threads, "fast_bfloat16", lambda device: request.param)
    return bool(request.param)


@pytest.mark.parametrize(("tol", "scale"), [(1e-2, 1.0), (1e-3, 1e-6), (1e-3, 1e5), (1e-4, 1.0)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_the_fast_engine_is_as_good_as_its_tolerance(
    kind: str, shape: tuple[int, int], tol: float, scale: float
) -> None:
    found = fast(matrix(kind, *shape) * scale, tol)
    assert truth(kind, *shape).excess(found, scale) < tol
    assert well_formed(found, shape, RANK)


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(640, 512), (512, 900)])
def test_trained_weights_are_truncated_in_either_arithmetic(
    shape: tuple[int, int], tol: float, bfloat16: bool
) -> None:
    found = fast(matrix("trained", *shape), tol, rank=64)
    assert truth("trained", *shape).excess(found) < tol
    assert well_formed(found, shape, 64)


def test_the_space_is_built_in_bfloat16_if_that_loses_nothing(
    bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces = []
    real = truncated._Top.search
    monkeypatch.setattr(
        truncated._Top, "search", lambda self, *args: spaces.append(type(self.operator)) or real(self, *args)
    )
    low, high = LowSweeps, Sweeps
    fast(matrix("trained", 640, 512), 1e-3)
    fast(matrix("random", 300, 200), 1e-3)
    assert spaces == [low if bfloat16 else high, high]
    fast(matrix("trained", 640, 512), 1e-6)
    assert spaces[2:] == [high], "bfloat16 does not reach such a tolerance"
    fast(matrix("steep", 300, 200).bfloat16().float(), 1e-3)
    assert spaces[3:] == ([low, high] if bfloat16 else [high]), "nor so small a residual"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slice_", ["top", "bottom", "middle", "random"])
def test_a_matrix_as_stored_is_decomposed_like_its_float32_copy(slice_: str, dtype: torch.dtype) -> None:
    weight = matrix("trained", 320, 400).to(dtype)
    answers = [getattr(Solver("w"), slice_)(each, 16) for each in (weight, weight.float())]
    assert torch.equal(answers[0].sigma_R, answers[1].sigma_R)
    assert torch.equal(answers[0].left_OR, answers[1].left_OR)
    assert torch.equal(answers[0].right_RI, answers[1].right_RI)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_singular_values_are_right(kind: str, shape: tuple[int, int]) -> None:
    weight, wanted = matrix(kind, *shape), truth(kind, *shape).sigma[:RANK]
    assert np.abs(fast(weight, 1e-4).sigma_R.numpy() - wanted).max() < 3e-3 * wanted[0]
    for engine in (exact_top, gram_top):
        assert np.abs(engine(weight, RANK).sigma_R.numpy() - wanted).max() < 2e-6 * wanted[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_a_decomposition_by_the_full_gram_matrix_is_the_optimum(kind: str, shape: tuple[int, int]) -> None:
    assert truth(kind, *shape).excess(gram_top(matrix(kind, *shape), RANK)) < 1e-5


@pytest.mark.parametrize("size", [1e-25, 1e-18, 1e18])
def test_a_matrix_decomposed_by_its_full_gram_matrix_may_be_large_or_small(size: float) -> None:
    weight = matrix("trained", 60, 40)
    found, wanted = gram_top(weight * size, 8), torch.linalg.svdvals(weight.double())[:8]
    assert (found.sigma_R.double() / size - wanted).abs().max() < 1e-5 * wanted[0]


def test_a_matrix_too_small_for_a_space_has_none() -> None:
    assert fast_top(torch.randn(10, 10), 5, tol=1e-2, generator=torch.Generator().manual_seed(0)) is None


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_the_estimated_excess_is_close_to_the_true_one(
    kind: str, shape: tuple[int, int], tol: float, seed: int
) -> None:
    found = fast(matrix(kind, *shape), tol, seed)
    true = truth(kind, *shape).excess(found)
    assert found.spectrum.excess < tol
    assert 0.7 * true - NOISE < found.spectrum.excess < 3 * max(true, 0.0) + NOISE


@pytest.mark.parametrize("rank", [32, 64])
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(640, 512), (512, 900)])
def test_the_estimate_holds_on_trained_weights_in_either_arithmetic(
    shape: tuple[int, int], tol: float, rank: int, bfloat16: bool
) -> None:
    found = fast(matrix("trained", *shape), tol, rank=rank)
    true = truth("trained", *shape).excess(found)
    assert 0.7 * true - NOISE < found.spectrum.excess < 3 * true + NOISE


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["flat", "slow", "power", "deficient", "random"])
def test_the_estimate_knows_what_products_in_bfloat16_lose(
    kind: str, shape: tuple[int, int], tol: float, bfloat16: bool
) -> None:
    rounded = Truth(matrix(kind, *shape).bfloat16().float())
    found = fast(rounded.weight, tol)
    true = rounded.excess(found)
    assert true < tol
    assert 0.7 * true - NOISE < found.spectrum.excess < 3 * true + NOISE


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
    zeros = torch.zeros(300, 200)
    for found in (fast(zeros, 1e-3), exact_top(zeros, RANK), gram_top(zeros, RANK)):
        assert not found.sigma_R.any()
        assert well_formed(found, (300, 200), RANK)
        assert found.spectrum.energy == 1.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 300), (40, 3)])
@pytest.mark.parametrize("svd", ["fast", "exact", "exact64"])
def test_narrow_matrices_are_decomposed_up_to_their_own_rank(shape: tuple[int, int], svd: str) -> None:
    weight = torch.randn(shape)
    rank = min(shape)
    found = Solver("w", svd).top(weight, rank)
    assert torch.allclose(found.left_OR * found.sigma_R @ found.right_RI, weight, atol=1e-5)
    assert found.left_OR.shape == (shape[0], rank) and found.right_RI.shape == (rank, shape[1])


def test_the_engine_is_exact_if_it_is_asked_for_or_saves_time() -> None:
    weight = matrix("power", 300, 200)
    assert Solver("w", "fast").top(weight, RANK).spectrum.engine == "fast"
    assert Solver("w", "exact").top(weight, RANK).spectrum.engine == "exact"
    rank = 80
    assert space_needed(rank) > 200
    assert Solver("w", "fast").top(weight, rank).spectrum.engine == "exact"


def test_lapack_takes_over_if_the_tolerance_is_out_of_reach() -> None:
    weight = torch.eye(300) + 1e-3 * matrix("random", 300, 300)
    found = Solver("w", "fast", tol=1e-9).top(weight, RANK)
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


@pytest.mark.parametrize("noise", [0.0, 0.02, 10.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_factors_near_the_result_or_far_from_it_change_no_more_than_the_tolerance(
    kind: str, shape: tuple[int, int], noise: float
) -> None:
    weight = matrix(kind, *shape)
    generator = torch.Generator().manual_seed(5)
    other = weight + noise * weight.std() * torch.randn(shape, generator=generator)
    before = exact_top(other, RANK)
    found = Solver("near", tol=1e-3).top(weight, RANK, (before.left_OR * before.sigma_R, before.right_RI))
    assert truth(kind, *shape).excess(found) < 1e-3
    assert well_formed(found, shape, RANK)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_near_factors_may_be_of_any_rank(shape: tuple[int, int], value: float) -> None:
    rows, columns = shape
    near = (torch.full((rows, RANK), value), torch.full((RANK, columns), value))
    found = Solver("near", tol=1e-3).top(matrix("power", *shape), RANK, near)
    assert truth("power", *shape).excess(found) < 1e-3


def test_near_factors_are_ignored_if_a_space_has_no_room_for_them() -> None:
    weight = matrix("trained", 600, 640)
    assert space_needed(256) < 600
    near = (torch.ones(600, 256), torch.ones(256, 640))
    found, expected = (Solver("near").top(weight, 256, given) for given in (near, None))
    assert torch.equal(found.left_OR, expected.left_OR)


def test_a_known_energy_is_used_for_its_matrix_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, other = matrix("slow", 300, 200), matrix("power", 300, 200)
    expected = Solver("w").top(weight, RANK), Solver("w").top(other, RANK)
    energy = float(weight.double().square().sum())
    known = Solver("w", measured=(weight, energy))
    assert torch.equal(known.top(other, RANK).left_OR, expected[1].left_OR)
    monkeypatch.setattr(solver, "total_energy", lambda matrix: pytest.fail("measured again"))
    found = known.top(weight, RANK)
    assert torch.allclose(found.left_OR, expected[0].left_OR, atol=1e-5)
    assert found.spectrum.energy == pytest.approx(expected[0].spectrum.energy)
