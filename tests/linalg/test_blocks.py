"""Products by blocks of rows, against plain float64 arithmetic."""

import pytest
import torch
from torch import Tensor

from svdconvert.linalg import blocks
from svdconvert.linalg.blocks import (
    energy_outside,
    gram,
    gram_times,
    in_float32,
    low_gram_times,
    row_blocks,
    times,
    total_energy,
)

ROWS, COLUMNS = 40, 24
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def matrix(dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
    made = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    return made.T if transposed else made


@pytest.mark.parametrize("size", [1, 23, 24, 25, 7 * 24, 10**9])
def test_blocks_cover_a_matrix_once_and_are_bounded(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", size)
    monkeypatch.setattr(blocks, "_WHOLE", 0)
    slices = list(row_blocks(matrix(torch.float32)))
    assert [row for rows in slices for row in range(rows.start, rows.stop)] == list(range(ROWS))
    assert all((rows.stop - rows.start) * COLUMNS <= max(size, COLUMNS) for rows in slices)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_empty_matrix_has_no_energy(shape: tuple[int, int]) -> None:
    assert total_energy(torch.zeros(shape)) == 0.0


@pytest.mark.parametrize("size", [7 * 24, 10**9])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_by_blocks_are_those_of_the_entire_matrix(
    dtype: torch.dtype, transposed: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", size)
    monkeypatch.setattr(blocks, "_WHOLE", 0)
    monkeypatch.setattr(blocks, "_LOW_BLOCK", size)
    given = matrix(dtype, transposed=transposed)
    kept, wide = given.clone(), given.double()
    thin = torch.randn(given.shape[1], 3, generator=torch.Generator().manual_seed(1))
    left = torch.randn(given.shape[0], 3, generator=torch.Generator().manual_seed(2))
    wanted = {
        "times": (times(given, thin), wide @ thin.double()),
        "gram_times": (gram_times(given, thin), wide.T @ (wide @ thin.double())),
        "gram in float32": (gram(given, torch.float32), wide.T @ wide),
        "gram in float64": (gram(given, torch.float64), wide.T @ wide),
    }
    for name, (found, exact) in wanted.items():
        assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-4), name
    found = low_gram_times(given.bfloat16(), thin)
    assert (found.double() - wanted["gram_times"][1]).norm() < 1e-2 * wanted["gram_times"][1].norm()
    assert total_energy(given) == pytest.approx(float(wide.square().sum()), rel=1e-6)
    outside = float((wide - left.double() @ thin.T.double()).square().sum())
    assert energy_outside(given, left, thin.T) == pytest.approx(outside, rel=1e-6)
    assert torch.equal(given, kept), "the matrix itself was changed"


def test_a_float32_matrix_is_not_copied() -> None:
    given = matrix(torch.float32)
    assert all(part.data_ptr() == given[rows].data_ptr() for rows, part in in_float32(given))


def test_parts_of_a_wide_float32_matrix_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every product with a part would begin with a transposed copy of it."""
    monkeypatch.setattr(blocks, "_BLOCK", 64)
    monkeypatch.setattr(blocks, "_WHOLE", 0)
    stored = torch.randn(8, 40)
    parts = list(blocks.in_float32(stored.T))
    assert len(parts) > 1 and all(part.T.is_contiguous() for _, part in parts)
    assert torch.equal(torch.cat([part for _, part in parts]), stored.T)


def test_the_energy_of_a_large_matrix_is_added_up_without_loss() -> None:
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    wanted = float(weight.double().square().sum())
    assert total_energy(weight) == pytest.approx(wanted, rel=1e-6)
    assert total_energy(weight.T) == pytest.approx(wanted, rel=1e-6)
