"""Stochastic rounding: up or down at random, so that the expected value is the exact number.

A bfloat16 number plus a change of less than half its last place rounds to itself, and the change is lost
in every entry. With stochastic rounding it is kept on average (Gupta et al., arXiv:1502.02551).
"""

import torch
from torch import Tensor


def stochastic(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A float32 tensor in bfloat16 or float16, each entry rounded to one of its two neighbours.

    A neighbour's probability falls linearly with its distance; a number that `dtype` represents is kept. The
    generator is on the tensor's device.
    """
    nearest = exact.to(dtype)
    # As integers, the bits of a magnitude count the steps from zero, regardless of the sign.
    past = (nearest.float().abs() > exact.abs()).to(torch.int16)
    below = (nearest.view(torch.int16) - past).view(dtype)
    above = (below.view(torch.int16) + 1).view(dtype)
    low = below.float().abs()
    high = above.float().abs()
    share = (exact.abs() - low) / (high - low)
    drawn = torch.rand(exact.shape, generator=generator, device=exact.device)
    return torch.where(drawn < share, above, below)
