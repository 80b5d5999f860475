"""Matrices with known spectra, and what float64 LAPACK says of their truncations."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svdconvert.linalg.triplets import Triplets

SHAPES = [(300, 200), (150, 400), (256, 256)]
SPECTRA = ("flat", "slow", "power", "steep", "clustered", "deficient", "random")


def singular_values(kind: str, count: int) -> NDArray[np.float64]:
    k = np.arange(1.0, count + 1)
    return {
        "flat": np.ones(count),
        "slow": 1 / np.sqrt(k),
        "power": 1 / k,
        "steep": 0.7**k,
        "clustered": np.where(k <= 20, 10.0, np.where(k <= 60, 1.0, 0.01)),
        "deficient": np.where(k <= 10, 1 / k, 0.0),
    }[kind]


@cache
def matrix(kind: str, rows: int, columns: int) -> Tensor:
    """A float32 matrix with the spectrum `kind`; "trained" is a power law over noise, in bfloat16 numbers."""
    draw = np.random.default_rng(rows + columns).standard_normal
    if kind == "random":
        return torch.tensor(draw((rows, columns)), dtype=torch.float32)
    count = min(rows, columns)
    left = np.linalg.qr(draw((rows, count)))[0]
    right = np.linalg.qr(draw((columns, count)))[0]
    if kind == "trained":
        law = 3 * np.sqrt(rows + columns) / np.sqrt(np.arange(1.0, count + 1))
        values = torch.tensor((left * law) @ right.T + draw((rows, columns)), dtype=torch.float32)
        return (0.02 * values).bfloat16().float()
    return torch.tensor((left * singular_values(kind, count)) @ right.T, dtype=torch.float32)


@dataclass
class Truth:
    """What float64 LAPACK says of `weight`."""

    weight: Tensor

    @cached_property
    def sigma(self) -> NDArray[np.float64]:
        return np.linalg.svd(self.weight.double().numpy(), compute_uv=False)

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.sigma))

    def excess(self, found: Triplets, scale: float = 1.0) -> float:
        """Residual's norm over the optimal one, minus one; where that is noise, the residual's relative norm.

        `found` is the top slice of `scale` times the matrix.
        """
        residual = float(torch.linalg.vector_norm(self.weight.double() - product(found) / scale))
        optimum = float(np.linalg.norm(self.sigma[len(found.sigma_R) :]))
        return residual / optimum - 1 if optimum > 1e-5 * self.norm else residual / self.norm

    def bottom_excess(self, found: Triplets) -> float:
        """Norm of the bottom slice over the smallest possible, minus one; or its relative norm.

        Of the part of the matrix in the slice's directions on the shorter side.
        """
        rows, columns = self.weight.shape
        exact = self.weight.double() @ found.right_RI.double().T
        if rows < columns:
            exact = self.weight.double().T @ found.left_OR.double()
        kept = float(torch.linalg.vector_norm(exact))
        optimum = float(np.linalg.norm(self.sigma[-len(found.sigma_R) :]))
        return kept / optimum - 1 if optimum > 1e-5 * self.norm else kept / self.norm


@cache
def truth(kind: str, rows: int, columns: int) -> Truth:
    return Truth(matrix(kind, rows, columns))


def product(found: Triplets) -> Tensor:
    return found.left_OR.double() * found.sigma_R.double() @ found.right_RI.double()


def orthonormal(columns: Tensor) -> bool:
    gram = columns.double().T @ columns.double()
    return bool((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-5)


def well_formed(found: Triplets, shape: tuple[int, ...], rank: int) -> bool:
    """True if both factors are orthonormal and of the right shape, with descending values."""
    shapes = (tuple(found.left_OR.shape), tuple(found.sigma_R.shape), tuple(found.right_RI.shape))
    return (
        shapes == ((shape[0], rank), (rank,), (rank, shape[1]))
        and orthonormal(found.left_OR)
        and orthonormal(found.right_RI.T)
        and bool((found.sigma_R[:-1] >= found.sigma_R[1:]).all())
    )
