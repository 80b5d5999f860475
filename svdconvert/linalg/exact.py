"""Every singular triplet by LAPACK, and the slices that are cut from them.  O: rows, I: columns, R: rank."""

import threading

import torch
from torch import Tensor

from svdconvert.linalg.triplets import Triplets, spectrum_of

_ALONE = threading.Lock()


def exact_slice(weight_OI: Tensor, kept: Tensor, dtype: torch.dtype = torch.float32) -> Triplets:
    """The triplets numbered `kept` (0 is the largest), computed in `dtype`, in float32.

    One matrix at a time, whatever goes on in other threads: LAPACK takes the memory of several.
    """
    with _ALONE:
        left, sigma, right = torch.linalg.svd(weight_OI.to(dtype), full_matrices=False)
    total = float(sigma.double().square().sum())
    chosen = kept.to(sigma.device)
    sigma_R = sigma[chosen].float()
    spectrum = spectrum_of(sigma_R, total, 0.0, "exact")
    return Triplets(left[:, chosen].float(), sigma_R, right[chosen].float(), spectrum)


def exact_top(weight_OI: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Triplets:
    """The `rank` largest."""
    return exact_slice(weight_OI, torch.arange(rank), dtype)


def exact_bottom(weight_OI: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Triplets:
    """The `rank` smallest."""
    count = min(weight_OI.shape)
    return exact_slice(weight_OI, torch.arange(count - rank, count), dtype)


def exact_middle(weight_OI: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Triplets:
    """The `rank` in the middle of the spectrum."""
    first = (min(weight_OI.shape) - rank) // 2
    return exact_slice(weight_OI, torch.arange(first, first + rank), dtype)


def exact_random(
    weight_OI: Tensor, rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Triplets:
    """`rank` drawn without replacement."""
    drawn = torch.randperm(min(weight_OI.shape), generator=generator)[:rank]
    return exact_slice(weight_OI, drawn.sort().values, dtype)
