"""The engines on a GPU against float64 LAPACK on the CPU."""

import pytest
import torch

from svdconvert.linalg.solver import Solver
from svdconvert.linalg.triplets import Triplets
from tests.linalg.spectra import SHAPES, SPECTRA, matrix, truth, well_formed

RANK = 16


def on_cpu(found: Triplets) -> Triplets:
    return Triplets(found.left_OR.cpu(), found.sigma_R.cpu(), found.right_RI.cpu(), found.spectrum)


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*SPECTRA, "trained"])
def test_the_top_slice_is_as_good_as_its_tolerance(kind: str, shape: tuple[int, int], tol: float) -> None:
    found = on_cpu(Solver("w", tol=tol).top(matrix(kind, *shape).cuda(), RANK))
    assert truth(kind, *shape).excess(found) < tol
    assert well_formed(found, shape, RANK)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["slow", "power", "trained", "random"])
def test_the_bottom_slice_is_as_good_as_its_tolerance(kind: str, shape: tuple[int, int]) -> None:
    found = on_cpu(Solver("w", tol=1e-3).bottom(matrix(kind, *shape).cuda(), RANK))
    assert truth(kind, *shape).bottom_excess(found) < 2e-3
    assert well_formed(found, shape, RANK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tol", [6e-3, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", [(2048, 1024), (1024, 2048), (1536, 1536)])
def test_trained_matrices_of_real_size_are_truncated_in_either_dtype(
    shape: tuple[int, int], tol: float, dtype: torch.dtype
) -> None:
    found = on_cpu(Solver("w", tol=tol).top(matrix("trained", *shape).to(dtype).cuda(), 64))
    excess = truth("trained", *shape).excess(found)
    assert excess < tol
    assert found.spectrum.engine == "fast"
    assert found.spectrum.excess is not None
    assert 0.7 * excess - 2e-6 < found.spectrum.excess < 4 * excess + 2e-6


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_the_same_matrix_gives_the_same_bytes(tol: float) -> None:
    weight = matrix("trained", 2048, 1024).bfloat16().cuda()
    first, second = (Solver("w", tol=tol).top(weight, 64) for _ in range(2))
    assert torch.equal(first.left_OR, second.left_OR)
    assert torch.equal(first.right_RI, second.right_RI)


def test_a_matrix_with_a_short_side_is_decomposed_by_its_gram_matrix() -> None:
    found = on_cpu(Solver("w").top(matrix("trained", 512, 64).cuda(), 32))
    assert found.spectrum.engine == "exact"
    assert truth("trained", 512, 64).excess(found) < 1e-5
