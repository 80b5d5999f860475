"""Gram matrices in float32 if that is accurate enough, against numpy's SVD in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from svdconvert.linalg.orthonormal import gram_eigen, orthonormal_again


def block(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    columns = torch.linalg.qr(torch.randn(300, 12, generator=generator, dtype=torch.float64)).Q
    if kind == "graded":
        return (columns * torch.logspace(0, -5, 12)).float()
    if kind == "mixed":
        return (columns @ torch.randn(12, 12, generator=generator, dtype=torch.float64)).float()
    if kind == "dependent":
        return (columns[:, :1] + 1e-3 * columns).float()
    return {"large": columns * 1e17, "small": columns * 1e-17, "zero": columns * 0}[kind].float()


@pytest.mark.parametrize("kind", ["graded", "mixed", "dependent", "large", "small"])
def test_singular_values_and_vectors_are_numpys(kind: str) -> None:
    given = block(kind)
    found, wanted = gram_eigen(given), np.linalg.svd(given.double().numpy())[1]
    assert np.allclose(found.squares_B.sqrt().numpy(), wanted, rtol=1e-5)
    left = found.left(given).double()
    assert (left.T @ left - torch.eye(12)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "independent"),
    [("graded", True), ("dependent", False), ("large", False), ("small", False), ("zero", False)],
)
def test_float32_is_used_if_it_can_represent_the_matrix(kind: str, independent: bool) -> None:
    assert gram_eigen(block(kind)).independent == independent


@pytest.mark.parametrize("far", [1e-3, 0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_becomes_orthonormal_and_spans_the_same_space(far: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    block = torch.linalg.qr(torch.randn(400, 32, generator=generator, dtype=torch.float64)).Q
    block = block @ (torch.eye(32) + far * torch.randn(32, 32, generator=generator) / 32**0.5).double()
    found = orthonormal_again(block.to(dtype))
    rounding = torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert torch.dist(found.T @ found, torch.eye(32, dtype=dtype)) < 20 * rounding
    span = torch.linalg.qr(block).Q
    assert torch.dist(span @ (span.T @ found.double()), found.double()) < 400 * rounding


def test_a_block_of_dependent_columns_becomes_orthonormal_too() -> None:
    block = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    block[:, 7] = block[:, 0] + block[:, 1]
    found = orthonormal_again(block)
    assert torch.dist(found.T @ found, torch.eye(8)) < 1e-5
