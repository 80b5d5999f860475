"""Full SVDs by LAPACK, and selections of their triplets.  O: rows, I: columns, R: rank."""

import threading

import torch
from torch import Tensor

from svdconvert.linalg.triplets import Triplets, spectrum_of

_ONE_AT_A_TIME = threading.Lock()


def exact_slice(weight_OI: Tensor, kept: Tensor, dtype: torch.dtype = torch.float32) -> Triplets:
    """The triplets numbered `kept` (0 is the largest), computed in `dtype` and returned in float32.

    Threads take turns, because LAPACK needs the memory of several matrices.
    """
    with _ONE_AT_A_TIME:
        left, sigma, right = torch.linalg.svd(weight_OI.to(dtype), full_matrices=False)
    total = float(sigma.double().square().sum())
    chosen = kept.to(sigma.device)
    sigma_R = sigma[chosen].float()
    spectrum = spectrum_of(sigma_R, total, 0.0, "exact")
    return Triplets(left[:, chosen].float(), sigma_R, right[chosen].float(), spectrum)


def exact_top(weight_OI: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Triplets:
    """The `rank` largest triplets."""
    return exact_slice(weight_OI, torch.arange(rank), dtype)


def exact_bottom(weight_OI: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Triplets:
    """The `rank` smallest triplets."""
    count = min(weight_OI.shape)
    return exact_slice(weight_OI, torch.arange(count - rank, count), dtype)


def exact_middle(weight_OI: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Triplets:
    """The `rank` triplets in the middle of the spectrum."""
    first = (min(weight_OI.shape) - rank) // 2
    return exact_slice(weight_OI, torch.arange(first, first + rank), dtype)


def exact_random(
    weight_OI: Tensor, rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Triplets:
    """`rank` triplets drawn without replacement."""
    drawn = torch.randperm(min(weight_OI.shape), generator=generator)[:rank]
    return exact_slice(weight_OI, drawn.sort().values, dtype)
