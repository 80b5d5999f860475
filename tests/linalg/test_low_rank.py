"""Products of thin factors against the dense SVD of the product."""

import numpy as np
import pytest
import torch
from torch import Tensor

from svdconvert.linalg.low_rank import (
    allocate_ranks,
    rank_for_tolerance,
    singular_values,
    truncate,
    truncation_error,
)


def factors(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator)
    return left * torch.logspace(0, -3, rank), torch.randn(rank, columns, generator=generator)


SHAPES = [(40, 30, 8), (30, 40, 8), (12, 50, 20), (50, 12, 20), (1, 9, 3), (9, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_product(shape: tuple[int, int, int]) -> None:
    left, right = factors(*shape)
    wanted = np.linalg.svd((left.double() @ right.double()).numpy(), compute_uv=False)
    found = singular_values(left.double(), right.double()).numpy()
    assert np.abs(found - wanted[: len(found)]).max() < 1e-12 * wanted[0]
    assert wanted[len(found) :].max(initial=0.0) < 1e-12 * wanted[0]


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_truncation_is_the_best_one_and_its_error_is_known(shape: tuple[int, int, int], rank: int) -> None:
    left, right = factors(*shape)
    product = left.double() @ right.double()
    kept_left, kept_right = truncate(left, right, rank)
    sigma = singular_values(left.double(), right.double())
    lost = float(torch.linalg.vector_norm(product - kept_left.double() @ kept_right.double()))
    assert lost == pytest.approx(truncation_error(sigma, rank), rel=1e-5, abs=1e-6 * float(sigma[0]))
    assert kept_left.shape[1] == kept_right.shape[0] == min(rank, len(sigma))
    assert kept_left.dtype == kept_right.dtype == torch.float32


def test_a_truncation_to_the_full_rank_loses_nothing() -> None:
    left, right = factors(40, 30, 8)
    kept_left, kept_right = truncate(left, right, 8)
    assert torch.allclose(kept_left @ kept_right, left @ right, atol=1e-5)
    left_norms, right_norms = kept_left.norm(dim=0), kept_right.norm(dim=1)
    assert torch.allclose(left_norms, right_norms), "the singular values are not shared out evenly"


def test_the_least_rank_within_a_tolerance() -> None:
    sigma = torch.tensor([4.0, 2.0, 1.0, 0.0])
    whole = truncation_error(sigma, 0)
    for rank in range(4):
        exactly = truncation_error(sigma, rank) / whole
        assert rank_for_tolerance(sigma, exactly + 1e-9) == rank
        assert rank == 3 or rank_for_tolerance(sigma, exactly - 1e-9) == rank + 1
    assert rank_for_tolerance(torch.zeros(4), 0.1) == 0


def test_a_budget_goes_where_the_singular_values_are_largest() -> None:
    sigmas = {"a": torch.tensor([9.0, 1.0, 1.0]), "b": torch.tensor([8.0, 7.0]), "c": torch.zeros(2)}
    assert allocate_ranks(sigmas, 3) == {"a": 1, "b": 2, "c": 0}
    assert allocate_ranks(sigmas, 1) == {"a": 1, "b": 0, "c": 0}
    assert allocate_ranks(sigmas, 4) == {"a": 2, "b": 2, "c": 0}
    assert allocate_ranks(sigmas, 99) == {"a": 3, "b": 2, "c": 0}, "zeros need no rank"


def test_no_other_ranks_of_the_same_budget_leave_out_less() -> None:
    sigmas = {name: singular_values(*factors(20, 15, 3, seed)) for seed, name in enumerate("abc")}
    ranks = allocate_ranks(sigmas, 5)
    least = sum(truncation_error(sigmas[name], rank) ** 2 for name, rank in ranks.items())
    for a in range(4):
        for b in range(4):
            if 0 <= 5 - a - b <= 3:
                other = zip("abc", (a, b, 5 - a - b), strict=True)
                assert sum(truncation_error(sigmas[name], rank) ** 2 for name, rank in other) >= least * (
                    1 - 1e-9
                )
