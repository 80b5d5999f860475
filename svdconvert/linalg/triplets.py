"""What a truncated decomposition is.  O: rows, I: columns, R: rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.linalg.blocks import times
from svdconvert.linalg.gemm import matmul_f32
from svdconvert.linalg.orthonormal import gram_eigen, orthonormal


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of a truncation: singular values, energies and how it was made."""

    first: float
    """Largest singular value of the kept components."""
    last: float
    """Smallest singular value of the kept components."""
    energy: float
    """Share of ||W||_F^2 that the kept components hold."""
    excess: float | None
    """Estimate of ||W - W_r||_F over its optimum, minus one; of the bottom slice ||W_r||_F over its
    optimum, minus one; 0 where the SVD is exact, None where there is none."""
    engine: str
    """"fast" or "exact"."""


@dataclass(frozen=True, slots=True)
class Triplets:
    """left_OR @ diag(sigma_R) @ right_RI, singular values descending."""

    left_OR: Tensor
    sigma_R: Tensor
    right_RI: Tensor
    spectrum: Spectrum

    def transposed(self) -> "Triplets":
        """The triplets of the transposed matrix."""
        return Triplets(self.right_RI.T, self.sigma_R, self.left_OR.T, self.spectrum)


def spectrum_of(sigma_R: Tensor, total: float, excess: float | None, engine: str) -> Spectrum:
    """The record of a slice with the singular values `sigma_R` of a matrix with the energy `total`."""
    kept = float(sigma_R.double().square().sum())
    first, last = (float(sigma_R[0]), float(sigma_R[-1])) if len(sigma_R) else (0.0, 0.0)
    return Spectrum(first, last, kept / total if total else 1.0, excess, engine)


def thin_svd(block_LR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(left_LR, sigma_R, mix_RR) with block = left @ diag(sigma) @ mix.T, L >= R, in the block's dtype.

    eigh of the R x R Gram matrix in place of an SVD: from a float32 block it loses nothing until
    sigma_R / sigma_1 comes near float64's own square root; there the SVD takes over.
    """
    found = gram_eigen(block_LR)
    if not float(found.squares_B[-1]) > 1e-12 * float(found.squares_B[0]):
        left, sigma, right = torch.linalg.svd(block_LR.double(), full_matrices=False)
        left = orthonormal(left.to(block_LR.dtype))
        return left, sigma.to(block_LR.dtype), right.T.to(block_LR.dtype)
    sigma_R, mix_RR = found.squares_B.sqrt(), found.mix_BB
    return found.left(block_LR), sigma_R.to(block_LR.dtype), mix_RR.to(block_LR.dtype)


def project(weight_LS: Tensor, basis_SR: Tensor, total: float, excess: float, engine: str) -> Triplets:
    """The SVD of W Q Q^T, from the product W Q and the SVD of its thin result.

    L, S: the longer and the shorter side, Q the basis.
    """
    left_LR, sigma_R, mix_RR = thin_svd(times(weight_LS, basis_SR))
    right_RS = matmul_f32(basis_SR, mix_RR).T
    return Triplets(left_LR, sigma_R, right_RS, spectrum_of(sigma_R, total, excess, engine))
