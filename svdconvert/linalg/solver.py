"""Which engine answers a method's question, and with which random numbers."""

from dataclasses import dataclass
from typing import Literal

import torch
import xxhash
from torch import Tensor

from svdconvert.linalg.truncated import Triplets, exact_top, fast_top, gram_top, space_needed


@dataclass(frozen=True, slots=True)
class Solver:
    """The linear algebra that a method may ask for, for one tensor."""

    name: str
    """The tensor's name: part of the seed, so that the order of work changes nothing."""
    svd: Literal["fast", "exact"] = "fast"
    tol: float = 1e-3
    seed: int = 0

    def generator(self) -> torch.Generator:
        """A fresh generator seeded by (seed, name)."""
        digest = xxhash.xxh3_64_intdigest(f"{self.seed}:{self.name}".encode())
        return torch.Generator().manual_seed(digest >> 1)

    def top(self, weight_OI: Tensor, rank: int) -> Triplets:
        """The `rank` largest singular triplets.

        The fast engine solves a matrix whole where the rank is near its own, and gives way to LAPACK
        where it does not reach `tol`.
        """
        if self.svd == "fast":
            if min(weight_OI.shape) <= space_needed(rank):
                return gram_top(weight_OI, rank)
            found = fast_top(weight_OI, rank, tol=self.tol, generator=self.generator())
            if found is not None:
                return found
        return exact_top(weight_OI, rank)
