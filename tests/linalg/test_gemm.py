"""Products in float32 against numpy in float64, from whichever library."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from svdconvert.linalg import gemm
from svdconvert.linalg.gemm import add_matmul_f32, matmul_f32

SIDES = [(5, 7, 3), (1, 1, 1), (1, 300, 1), (64, 1, 20), (300, 200, 64), (192, 513, 128)]


def layouts(rows: int, columns: int) -> dict[str, Tensor]:
    """The same shape, laid out in memory in several ways."""
    return {
        "rows": torch.randn(rows, columns),
        "columns": torch.randn(columns, rows).T,
        "part": torch.randn(rows + 3, columns + 5)[2 : rows + 2, 4 : columns + 4],
        "part of columns": torch.randn(columns + 5, rows + 3)[4 : columns + 4, 2 : rows + 2].T,
        "every second": torch.randn(2 * rows, columns)[::2],
    }


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("sides", SIDES)
def test_a_product_is_numpys(
    sides: tuple[int, int, int], onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn and not gemm._has_onednn():
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(gemm, "_prefers_onednn", lambda: onednn)
    rows, inner, columns = sides
    for left in layouts(rows, inner).values():
        for right in layouts(inner, columns).values():
            found = matmul_f32(left, right)
            wide, narrow = left.double().numpy(), right.double().numpy()
            assert found.shape == (rows, columns)
            error = np.abs(found.double().numpy() - wide @ narrow)
            assert (error < 3e-6 * (np.abs(wide) @ np.abs(narrow))).all()
            both = torch.ones(rows, columns)
            add_matmul_f32(both, left, right)
            error = np.abs(both.double().numpy() - 1 - wide @ narrow)
            assert (error < 3e-6 * (1 + np.abs(wide) @ np.abs(narrow))).all()


def test_a_part_of_a_matrix_is_copied_and_a_contiguous_matrix_is_not() -> None:
    for name, matrix in layouts(20, 30).items():
        for view in (matrix, matrix.T):
            dense = gemm._dense(view)
            assert torch.equal(dense, view)
            assert (dense is view) == (name in ("rows", "columns"))
            assert dense.is_contiguous() or dense.T.is_contiguous()


def test_an_empty_product_is_empty_or_zero() -> None:
    assert matmul_f32(torch.ones(0, 3), torch.ones(3, 2)).shape == (0, 2)
    assert torch.equal(matmul_f32(torch.ones(2, 0), torch.ones(0, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    left, right = torch.randn(4, 5).to(dtype), torch.randn(5, 6).to(dtype)
    assert torch.equal(matmul_f32(left, right), left @ right)


@pytest.mark.parametrize(
    ("text", "intel"),
    [
        ("vendor_id\t: GenuineIntel\nmodel name\t: x", True),
        ("vendor_id\t: AuthenticAMD\n", False),
        (None, False),
    ],
)
def test_intels_processors_multiply_with_mkl(
    text: str | None, intel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = tmp_path / "cpuinfo"
    if text is not None:
        described.write_text(text)
    monkeypatch.setattr(gemm, "Path", lambda _: described)
    monkeypatch.setattr("platform.processor", lambda: "")
    assert gemm._is_intel() is intel


def test_without_proc_the_platform_names_the_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "Path", lambda _: tmp_path / "missing")
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 154, GenuineIntel")
    assert gemm._is_intel()
