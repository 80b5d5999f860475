"""Chooses the engine that computes the triplets of a method, and seeds its random numbers."""

from dataclasses import dataclass
from typing import Literal

import torch
import xxhash
from torch import Tensor

from svdconvert.linalg.blocks import total_energy
from svdconvert.linalg.bottom import fast_bottom
from svdconvert.linalg.exact import exact_bottom, exact_middle, exact_random, exact_top
from svdconvert.linalg.krylov import space_needed
from svdconvert.linalg.threads import CPU
from svdconvert.linalg.triplets import Triplets
from svdconvert.linalg.truncated import fast_top, gram_top


@dataclass(frozen=True, slots=True)
class Solver:
    """The linear algebra for methods: of matrices in any float dtype, with results in float32."""

    name: str
    """The tensor's name: part of the seed, so that the order of the tensors does not matter."""
    svd: Literal["fast", "exact", "exact64"] = "fast"
    """exact is LAPACK in float32, exact64 in float64."""
    tol: float = 1e-3
    seed: int = 0
    alone: bool = False
    """True if no other thread multiplies matrices meanwhile, so that process-wide settings may be changed."""
    measured: tuple[Tensor, float] | None = None
    """A matrix whose ||W||_F^2 is known, and that: it need not be measured again."""

    def generator(self, device: torch.device = CPU) -> torch.Generator:
        """A fresh generator seeded by (seed, name); a GPU draws other numbers than a CPU, but faster."""
        digest = xxhash.xxh3_64_intdigest(f"{self.seed}:{self.name}".encode())
        return torch.Generator(device).manual_seed(digest >> 1)

    def top(self, weight_OI: Tensor, rank: int, near: tuple[Tensor, Tensor] | None = None) -> Triplets:
        """The `rank` largest singular triplets.

        If the rank is close to the matrix's own, the fast engine uses the full Gram matrix. If it does not
        reach `tol`, LAPACK takes over. `near` are factors (O, R) and (R, I) whose product is probably near to
        the result, which makes the fast engine faster.
        """
        found = None
        if self.svd == "fast":
            if min(weight_OI.shape) <= space_needed(rank):
                return gram_top(weight_OI, rank)
            generator = self.generator(weight_OI.device)
            found = fast_top(
                weight_OI,
                rank,
                tol=self.tol,
                generator=generator,
                near=near,
                total=self._energy(weight_OI),
            )
        return found or exact_top(weight_OI, rank, self._dtype)

    def bottom(self, weight_OI: Tensor, rank: int) -> Triplets:
        """The `rank` smallest singular triplets, by the same rules."""
        found = None
        if self.svd == "fast" and min(weight_OI.shape) > space_needed(rank):
            found = fast_bottom(
                weight_OI.float(),
                rank,
                tol=self.tol,
                generator=self.generator(weight_OI.device),
                alone=self.alone,
            )
        return found or exact_bottom(weight_OI, rank, self._dtype)

    def middle(self, weight_OI: Tensor, rank: int) -> Triplets:
        """The `rank` triplets in the middle of the spectrum, for ablations."""
        return exact_middle(weight_OI, rank, self._dtype)

    def random(self, weight_OI: Tensor, rank: int) -> Triplets:
        """`rank` triplets drawn without replacement, for ablations."""
        return exact_random(weight_OI, rank, self.generator(), self._dtype)

    def _energy(self, weight_OI: Tensor) -> float:
        if self.measured is not None and self.measured[0] is weight_OI:
            return self.measured[1]
        return total_energy(weight_OI)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.svd == "exact64" else torch.float32
