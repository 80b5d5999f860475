"""DoRA: rows of a matrix scaled to stored magnitudes (arXiv:2402.09353).  O: out features, I: in features."""

import torch
from torch import Tensor


def scaled_rows(weight_OI: Tensor, left_OR: Tensor, right_RI: Tensor, magnitude_O: Tensor) -> Tensor:
    """diag(m / ||V||) V in float32, V = weight + left @ right, ||V|| the norm of each row (equation 5)."""
    adapted_OI = weight_OI.float() + left_OR @ right_RI
    norm_O = torch.linalg.vector_norm(adapted_OI, dim=1)
    return adapted_OI.mul_((magnitude_O.float() / norm_O)[:, None])
