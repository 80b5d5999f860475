"""Values of tensors that change their element type."""

import torch
from torch import Tensor

from svdconvert.errors import TargetError


def cast_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in another element type. Raises TargetError if a finite value does not fit into it."""
    cast = tensor.to(dtype)
    if dtype != tensor.dtype and tensor.isfinite().all() and not cast.isfinite().all():
        raise TargetError(
            f"{name} holds values up to {float(tensor.abs().max()):.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; choose another --dtype"
        )
    return cast
