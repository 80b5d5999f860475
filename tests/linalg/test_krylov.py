"""A space says the same of itself, whenever it was looked at before, and a search in it ends."""

import pytest
import torch

from svdconvert.linalg.krylov import ErrorEstimate, Krylov, Ritz, Search, first_width, warm_start
from svdconvert.linalg.triplets import Spectrum, Triplets


def looked_at(widths: list[int]) -> Ritz:
    """The last of some looks at a growing space, after that many blocks each."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = (1.0 / torch.arange(1, 201))[:, None]
    start = torch.randn(200, 8, generator=generator)
    space = Krylov(lambda block: eigenvalues * block, warm_start(lambda x: eigenvalues * x, start, 1), 80)
    for width in widths:
        space.grow(width - space.width // 8)
        ritz = space.ritz(16)
    return ritz


@pytest.mark.parametrize("earlier", [[4], [3], [3, 4]])
def test_what_a_space_held_a_block_earlier_does_not_hang_on_earlier_looks(earlier: list[int]) -> None:
    alone, after = looked_at([5]), looked_at([*earlier, 5])
    assert torch.allclose(after.before_R, alone.before_R, rtol=1e-6)
    assert torch.allclose(alone.before_R, looked_at([4]).values_R, rtol=1e-6)
    assert (alone.values_R > alone.before_R).any()


NOTHING = Triplets(
    torch.empty(0, 0), torch.empty(0), torch.empty(0, 0), Spectrum(0.0, 0.0, 0.0, None, "fast")
)


def searched(promised: ErrorEstimate, measured: list[ErrorEstimate]) -> tuple[Triplets | None, int, int]:
    """(what a search finds that is promised and then measures this; results and columns that it took)."""
    eigenvalues = (1.0 / torch.arange(1, 401))[:, None]
    space = Krylov(lambda x: eigenvalues * x, torch.linalg.qr(torch.randn(400, 16)).Q, 320)
    left = iter(measured)
    search = Search(16, 1e-3, lambda ritz: promised, lambda vectors, estimate: (NOTHING, next(left)), 4)
    found = search.run(space)
    return found, len(measured) - len(list(left)), space.width


def test_a_search_ends_if_rounding_alone_exceeds_the_tolerance() -> None:
    assert searched(ErrorEstimate(1.0, 0.1, 0.5, rounding_floor=3e-3), []) == (None, 0, first_width(16))
    found, results, _ = searched(
        ErrorEstimate(1.0, 1e-4, 0.5), [ErrorEstimate(1.0, 1e-4, 0.5, rounding_floor=3e-3)] * 5
    )
    assert (found, results) == (None, 1)


def test_a_search_ends_if_results_do_not_improve() -> None:
    falling = [ErrorEstimate(1.0, missing, 0.5) for missing in (9e-3, 8e-3, 6e-3, 4e-3, 1e-3)]
    found, results, _ = searched(ErrorEstimate(1.0, 1e-4, 0.5), falling)
    assert results == 5
    assert found is not None and found.spectrum.excess == pytest.approx(5e-4, rel=1e-2)
    stuck = [ErrorEstimate(1.0, missing, 0.5) for missing in (9e-3, 8.9e-3, 8.8e-3, 8.7e-3, 1e-3)]
    assert searched(ErrorEstimate(1.0, 1e-4, 0.5), stuck)[:2] == (None, 3)


def kept(vectors_NR: torch.Tensor, eigenvalues_N: torch.Tensor) -> float:
    """The sum of the Rayleigh quotients."""
    return float((vectors_NR.double().square() * eigenvalues_N[:, None].double()).sum())


@pytest.mark.parametrize("power", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("blocks", [3, 4, 6])
def test_the_step_along_the_residuals_is_worth_most_of_a_block(power: float, blocks: int) -> None:
    eigenvalues_N = torch.arange(1.0, 601).pow(-power)
    start = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    space = Krylov(lambda block: eigenvalues_N[:, None] * block, torch.linalg.qr(start).Q, 320)
    space.grow(blocks)
    ritz = space.ritz(32)
    vectors = space.vectors(ritz)
    assert torch.dist(vectors.T @ vectors, torch.eye(32)) < 1e-5
    gained = kept(vectors, eigenvalues_N) - float(ritz.values_R.sum())
    space.grow(1)
    next_gain = float((space.ritz(32).values_R - ritz.values_R).sum())
    assert 0.7 * next_gain < gained < next_gain
    assert gained == pytest.approx(float(ritz.predicted_gain_R.sum()), rel=0.35)


def test_a_step_from_a_space_that_is_invariant_changes_nothing() -> None:
    eigenvalues_N = torch.tensor([2.0] * 40 + [1.0] * 60)
    start = torch.eye(100)[:, 20:52]
    space = Krylov(lambda block: eigenvalues_N[:, None] * block, start, 64)
    space.grow(1)
    ritz = space.ritz(20)
    assert float(ritz.predicted_gain_R.sum()) < 1e-10
    assert kept(space.vectors(ritz), eigenvalues_N) == pytest.approx(40.0)


def test_an_estimate_does_not_believe_a_last_gain_that_says_nothing() -> None:
    found = ErrorEstimate.of(0.9, 0.5, 1e-3)
    careful = ErrorEstimate.of(0.9, 0.5, 1e-3, least_ratio=0.5)
    assert careful.missing > 3 * found.missing and careful.cost == found.cost
    assert ErrorEstimate.of(0.5, 0.4, 0.08, least_ratio=0.5) == ErrorEstimate.of(0.5, 0.4, 0.08)
