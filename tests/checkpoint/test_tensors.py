"""Tensors as bytes."""

import pytest
import torch

from svdconvert.checkpoint.tensors import same_bytes


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn])
def test_tensors_are_the_same_if_their_bytes_are(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.full(shape, 3.0).to(dtype)
    assert same_bytes(tensor, tensor.clone())
    assert tensor.numel() == 0 or not same_bytes(tensor, torch.full(shape, 2.0).to(dtype))


def test_zeros_of_both_signs_differ_and_nan_is_itself() -> None:
    assert not same_bytes(torch.zeros(3), -torch.zeros(3))
    assert same_bytes(torch.full((3,), torch.nan), torch.full((3,), torch.nan))
