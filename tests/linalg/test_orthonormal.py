"""Gram matrices in float32 if that is accurate enough, against numpy's SVD in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from svdconvert.linalg.orthonormal import gram_eigen


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
