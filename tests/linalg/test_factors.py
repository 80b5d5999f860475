"""The pieces of a low-rank matrix, and what they stand for."""

import pytest
import torch

from svdconvert.linalg.factors import Factors

LEFT, RIGHT = torch.randn(7, 3), torch.randn(3, 5)
VECTOR, SQUARE = torch.randn(3), torch.randn(3, 3)
CORES = {"none": None, "vector": VECTOR, "square": SQUARE}
DENSE = {"none": LEFT @ RIGHT, "vector": LEFT @ VECTOR.diag() @ RIGHT, "square": LEFT @ SQUARE @ RIGHT}


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_dense_is_the_scaled_product_with_the_core(core: str, scale: float) -> None:
    dense = Factors(LEFT, RIGHT, CORES[core]).dense(scale)
    assert dense.dtype == torch.float32
    assert torch.allclose(dense, scale * DENSE[core], atol=1e-5)


@pytest.mark.parametrize("core", CORES)
def test_folding_leaves_a_plain_lora(core: str) -> None:
    left, right = Factors(LEFT, RIGHT, CORES[core]).folded()
    assert left.shape == (7, 3) and torch.equal(right, RIGHT)
    assert torch.allclose(left @ right, DENSE[core], atol=1e-5)


@pytest.mark.parametrize("core", CORES)
def test_half_precision_is_multiplied_in_float32(core: str) -> None:
    half = Factors(LEFT, RIGHT, CORES[core]).to(torch.bfloat16)
    wide = half.to(torch.float32)
    assert torch.equal(half.dense(1.0), wide.dense(1.0))


def test_folding_changes_no_piece() -> None:
    factors = Factors(LEFT.clone(), RIGHT.clone(), VECTOR.clone())
    factors.dense(3.0)
    assert torch.equal(factors.left_OR, LEFT) and torch.equal(factors.right_RI, RIGHT)


@pytest.mark.parametrize(("core", "names"), [("none", set()), ("vector", {"lora_S"}), ("square", {"lora_R"})])
def test_pieces_go_by_their_names_in_a_file_and_come_back(core: str, names: set[str]) -> None:
    factors = Factors(LEFT, RIGHT, CORES[core])
    assert factors.pieces().keys() == {"lora_A", "lora_B"} | names
    assert factors.pieces()["lora_A"].shape == (3, 5)
    assert Factors.of(factors.pieces()) == factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_pieces_are_contiguous_and_in_one_dtype(dtype: torch.dtype) -> None:
    stored = Factors(LEFT.T.contiguous().T, RIGHT.T.contiguous().T, VECTOR).to(dtype)
    for piece in stored.pieces().values():
        assert piece.dtype == dtype
        assert piece.is_contiguous()


def test_the_rank_is_the_inner_dimension() -> None:
    assert Factors(LEFT, RIGHT).rank == 3
