"""The largest singular triplets of a matrix, with a measured error.  O: rows, I: columns, R: rank.

Randomised subspace iteration with oversampling (Halko, Martinsson, Tropp 2011, arXiv:0909.4061,
algorithm 4.4) in float32. The energy that each sweep gains says how much is still missing, so the
iteration stops by a tolerance and not by a count.
"""

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

OVERSAMPLING = 16
_MOST_SWEEPS = 32
_FLOOR = 1e-6  # a residual below this share of the matrix is float32's own rounding


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of a truncation: singular values, energies and how it was made."""

    first: float
    """Largest singular value."""
    last: float
    """Singular value of the last kept (top slice) component."""
    energy: float
    """Share of ||W||_F^2 that the kept components hold."""
    excess: float
    """Estimate of ||W - W_r||_F over its optimum, minus one; 0 where the SVD is exact."""
    engine: str
    """"fast" or "exact"."""


@dataclass(frozen=True, slots=True)
class Triplets:
    """left_OR @ diag(sigma_R) @ right_RI, singular values descending."""

    left_OR: Tensor
    sigma_R: Tensor
    right_RI: Tensor
    spectrum: Spectrum


def exact_top(weight_OI: Tensor, rank: int) -> Triplets:
    """The `rank` largest triplets from LAPACK's full SVD, in the dtype of `weight_OI`."""
    left, sigma, right = torch.linalg.svd(weight_OI, full_matrices=False)
    squares = sigma.double().square()
    spectrum = _spectrum(sigma[:rank], float(squares.sum()), 0.0, "exact")
    return Triplets(left[:, :rank], sigma[:rank], right[:rank], spectrum)


def fast_top(weight_OI: Tensor, rank: int, *, tol: float, generator: torch.Generator) -> Triplets | None:
    """The `rank` largest triplets of a float32 matrix, or None where `tol` was not reached.

    `tol` bounds the estimated excess of the residual's norm over the optimal one.
    """
    rows, columns = weight_OI.shape
    width = min(rank + OVERSAMPLING, rows, columns)
    total = float(torch.linalg.vector_norm(weight_OI, dtype=torch.float64)) ** 2
    start = torch.randn(columns, width, generator=generator, dtype=torch.float32).to(weight_OI.device)
    basis_OK = _orthonormal(weight_OI @ start)
    energies: list[float] = []
    for _ in range(_MOST_SWEEPS):
        projection_IK = weight_OI.T @ basis_OK
        energies.append(_top_energy(projection_IK, rank))
        excess = _excess(energies, total)
        if excess < tol:
            return _triplets(basis_OK, projection_IK, rank, total, excess)
        basis_OK = _orthonormal(weight_OI @ _orthonormal(projection_IK))
    return None


def _triplets(basis_OK: Tensor, projection_IK: Tensor, rank: int, total: float, excess: float) -> Triplets:
    right, sigma, mix = torch.linalg.svd(projection_IK, full_matrices=False)
    left_OR = basis_OK @ mix[:rank].T
    spectrum = _spectrum(sigma[:rank], total, excess, "fast")
    return Triplets(left_OR, sigma[:rank], right[:, :rank].T, spectrum)


def _spectrum(sigma: Tensor, total: float, excess: float, engine: str) -> Spectrum:
    kept = float(sigma.double().square().sum())
    return Spectrum(float(sigma[0]), float(sigma[-1]), kept / total if total else 1.0, excess, engine)


def _orthonormal(block: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(block).Q
    return basis


def _top_energy(projection_IK: Tensor, rank: int) -> float:
    """Energy of the best rank-`rank` part of the projection; float64 because differences of it count."""
    wide = projection_IK.double()
    return float(torch.linalg.eigvalsh(wide.T @ wide)[-rank:].clamp_min(0).sum())


def _excess(energies: list[float], total: float) -> float:
    """Estimated relative excess of the residual's norm, from the gains of the last two sweeps.

    The gains shrink about geometrically, so what is still to come is the last gain times q / (1 - q).
    They shrink more slowly with every sweep, so q is not the ratio of the last two but its square root:
    with the ratio itself the estimate was up to 3 times too small on real weights. Not a bound.
    """
    residual = max(total - energies[-1], 0.0)
    if residual <= total * _FLOOR**2:
        return 0.0
    if len(energies) < 3:
        return inf
    gain, before = energies[-1] - energies[-2], energies[-2] - energies[-3]
    if gain <= 0.0 or before <= 0.0:
        return 0.0 if residual > total * 1e-7 else inf
    ratio = min(sqrt(gain / before), 0.975)
    missing = gain * ratio / (1.0 - ratio)
    optimum = residual - missing
    return inf if optimum <= 0.0 else sqrt(residual / optimum) - 1.0
