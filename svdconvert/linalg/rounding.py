"""Rounding by chance: up or down, so that the mean is the exact number.

A bfloat16 number plus a change below half its last place rounds to itself, and the change is lost however
many entries share it. Rounded by chance it is kept on average (Gupta et al., arXiv:1502.02551).
"""

import torch
from torch import Tensor


def stochastic(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A float32 tensor in bfloat16 or float16, each entry at one of its two neighbours there.

    The farther one is from a neighbour the less likely it is taken; a number of `dtype` stays as it is.
    """
    nearest = exact.to(dtype)
    # The bits of a magnitude count its steps from zero, whatever the sign.
    past = (nearest.float().abs() > exact.abs()).to(torch.int16)
    below = (nearest.view(torch.int16) - past).view(dtype)
    above = (below.view(torch.int16) + 1).view(dtype)
    low, high = below.float().abs(), above.float().abs()
    share = (exact.abs() - low) / (high - low)
    drawn = torch.rand(exact.shape, generator=generator).to(exact.device)
    return torch.where(drawn < share, above, below)
