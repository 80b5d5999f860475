"""The bottom slice and the selections for ablations, against float64 LAPACK."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from svdconvert.linalg import bottom, threads
from svdconvert.linalg.bottom import fast_bottom
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.triplets import Triplets
from tests.linalg.spectra import SHAPES, SPECTRA, Truth, matrix, product, truth, well_formed

RANK = 16
NOISE = 1e-5


def fast(weight: torch.Tensor, tol: float, seed: int = 1) -> Triplets:
    found = fast_bottom(weight, RANK, tol=tol, generator=torch.Generator().manual_seed(seed))
    assert found is not None
    return found


@pytest.mark.parametrize("tol", [1e-2, 1e-3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_the_bottom_slice_is_as_small_as_the_tolerance_says(
    kind: str, shape: tuple[int, int], tol: float
) -> None:
    found = Solver("w", tol=tol).bottom(matrix(kind, *shape), RANK)
    assert truth(kind, *shape).bottom_excess(found) < tol
    assert well_formed(found, shape, RANK)


@pytest.mark.parametrize("kind", SPECTRA)
def test_its_singular_values_are_the_smallest(kind: str) -> None:
    sigma = truth(kind, 300, 200).sigma
    for svd in ("fast", "exact", "exact64"):
        found = Solver("w", svd, tol=1e-4).bottom(matrix(kind, 300, 200), RANK)
        assert np.abs(found.sigma_R.numpy() - sigma[-RANK:]).max() < 1e-2 * sigma[-RANK] + 2e-6 * sigma[0]
        energy = (sigma[-RANK:] ** 2).sum() / (sigma**2).sum()
        assert found.spectrum.energy == pytest.approx(energy, rel=1e-2, abs=1e-11)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("tol", [1e-2, 1e-3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["flat", "slow", "power", "random"])
def test_the_estimated_excess_is_close_to_the_true_one(
    kind: str, shape: tuple[int, int], tol: float, seed: int
) -> None:
    found = fast(matrix(kind, *shape), tol, seed)
    true = truth(kind, *shape).bottom_excess(found)
    assert found.spectrum.engine == "fast" and found.spectrum.excess < tol
    assert 0.7 * true - NOISE < found.spectrum.excess < 3 * max(true, 0.0) + NOISE


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", [(900, 256), (256, 1200), (640, 512)])
def test_trained_weights_of_bfloat16_numbers(
    shape: tuple[int, int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, exact = matrix("trained", *shape), truth("trained", *shape)
    for units in (False, True):
        monkeypatch.setattr(threads, "fast_bfloat16", lambda device, units=units: units)
        found = fast(weight, 1e-3, seed)
        true = exact.bottom_excess(found)
        assert true < 1e-3 and well_formed(found, shape, RANK)
        assert 0.7 * true - NOISE < found.spectrum.excess < 3 * true + NOISE
    assert torch.get_float32_matmul_precision() == "highest", "a global setting was not put back"


def test_qr_replaces_a_gram_matrix_that_is_too_ill_conditioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "fast_bfloat16", lambda device: True)
    scale = torch.logspace(0, -4, 200)
    weight = (matrix("random", 400, 200) * scale).bfloat16().float()
    found = Solver("w").bottom(weight, RANK)
    sigma = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    kept = float(torch.linalg.vector_norm(weight.double() @ found.right_RI.double().T))
    assert kept / np.linalg.norm(sigma[-RANK:]) - 1 < 1e-3
    assert well_formed(found, (400, 200), RANK)


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", ["slow", "power"])
def test_the_gram_matrix_gives_what_the_tolerance_asks_for(
    kind: str, tol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "fast_bfloat16", lambda device: True)
    rounded = Truth(matrix(kind, 900, 400).bfloat16().float())
    found = fast(rounded.weight, tol)
    true, excess = rounded.bottom_excess(found), found.spectrum.excess
    assert excess is not None and true < tol and excess < tol
    assert well_formed(found, (900, 400), RANK)
    # Rounding W^T W to float32 moves the energy inside by up to eps / 2 of the total. The engine counts such
    # a move as missing although the vectors may be as good as before, so the estimate may be larger by it.
    rounding = torch.finfo(torch.float32).eps / 2 / (2 * found.spectrum.energy)
    assert 0.7 * true - NOISE < excess < 3 * true + NOISE + rounding


def test_lapack_takes_over_if_there_is_nothing_to_invert_or_no_time_to_save() -> None:
    for weight in (torch.zeros(300, 200), matrix("random", 30, 40)):
        found = Solver("w").bottom(weight, RANK)
        assert found.spectrum.engine == "exact"
        assert well_formed(found, tuple(weight.shape), RANK)


def test_the_same_seed_and_name_give_the_same_bits() -> None:
    weight = matrix("slow", 300, 200)
    before = torch.get_rng_state()
    first, again = (Solver("w", seed=3).bottom(weight, RANK) for _ in range(2))
    assert torch.equal(first.left_OR, again.left_OR) and torch.equal(first.sigma_R, again.sigma_R)
    assert not torch.equal(first.left_OR, Solver("w", seed=4).bottom(weight, RANK).left_OR)
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"


@pytest.mark.parametrize("svd", ["fast", "exact64"])
def test_middle_and_random_slices_are_components_of_the_matrix(svd: str) -> None:
    weight, sigma = matrix("power", 300, 200), truth("power", 300, 200).sigma
    solver = Solver("w", svd, seed=5)
    middle, drawn = solver.middle(weight, RANK), solver.random(weight, RANK)
    assert np.abs(middle.sigma_R.numpy() - sigma[92:108]).max() < 1e-6
    kept = np.abs(sigma[:, None] - drawn.sigma_R.numpy()).argmin(axis=0)
    assert len(set(kept)) == RANK and not (kept == np.arange(RANK)).all()
    assert torch.equal(drawn.sigma_R, solver.random(weight, RANK).sigma_R)
    assert not torch.equal(drawn.sigma_R, Solver("w", svd, seed=6).random(weight, RANK).sigma_R)
    for found in (middle, drawn):
        assert well_formed(found, (300, 200), RANK)
        rest = np.linalg.svd(weight.double().numpy() - product(found).numpy(), compute_uv=False)
        assert np.sum(rest > 1e-6) == 200 - RANK, "the components were not taken out"


@pytest.mark.parametrize("alone", [True, False])
def test_products_run_in_bfloat16_only_if_no_other_thread_multiplies(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "fast_bfloat16", lambda device: True)
    precisions: list[str] = []

    @contextmanager
    def watched(enabled: bool) -> Iterator[None]:
        with threads.bfloat16_products(enabled):
            precisions.append(torch.get_float32_matmul_precision())
            yield

    monkeypatch.setattr(bottom, "bfloat16_products", watched)
    Solver("w", alone=alone).bottom(matrix("trained", 640, 400), 16)
    assert precisions == ["medium" if alone else "highest"]
    assert torch.get_float32_matmul_precision() == "highest"
