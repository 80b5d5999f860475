"""A truncated decomposition, and what is recorded of it.  O: rows, I: columns, R: rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.linalg.blocks import times
from svdconvert.linalg.gemm import matmul_f32
from svdconvert.linalg.orthonormal import gram_eigen, orthonormal


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of a truncation: singular values, energy and engine."""

    first: float
    """The largest singular value that is kept."""
    last: float
    """The smallest singular value that is kept."""
    energy: float
    """The share of ||W||_F^2 in the kept triplets."""
    excess: float | None
    """Estimate of ||W - W_r||_F over its optimum, minus one; for the bottom slice, of ||W_r||_F over its
    optimum, minus one. 0 if the SVD is exact, None if there is none."""
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
    """The record of the triplets with the singular values `sigma_R` of a matrix with ||W||_F^2 = `total`."""
    kept = float(sigma_R.double().square().sum())
    first, last = (float(sigma_R[0]), float(sigma_R[-1])) if len(sigma_R) else (0.0, 0.0)
    return Spectrum(first, last, kept / total if total else 1.0, excess, engine)


def thin_svd(block_LR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(left_LR, sigma_R, mix_RR) with block = left @ diag(sigma) @ mix.T, L >= R, in the block's dtype.

    By eigh of the R x R Gram matrix, which is faster than an SVD and as accurate for a float32 block unless
    sigma_R / sigma_1 is near the square root of the precision of float64; then the SVD is used.
    """
    found = gram_eigen(block_LR)
    if not float(found.squares_B[-1]) > 1e-12 * float(found.squares_B[0]):
        left, sigma, right = torch.linalg.svd(block_LR.double(), full_matrices=False)
        left = orthonormal(left.to(block_LR.dtype))
        return left, sigma.to(block_LR.dtype), right.T.to(block_LR.dtype)
    sigma_R = found.squares_B.sqrt()
    mix_RR = found.mix_BB
    return found.left(block_LR), sigma_R.to(block_LR.dtype), mix_RR.to(block_LR.dtype)


def project(weight_LS: Tensor, basis_SR: Tensor, total: float, excess: float, engine: str) -> Triplets:
    """The SVD of W Q Q^T for an orthonormal basis Q, from the SVD of the thin product W Q.

    L, S: the longer and the shorter side.
    """
    left_LR, sigma_R, mix_RR = thin_svd(times(weight_LS, basis_SR))
    right_RS = matmul_f32(basis_SR, mix_RR).T
    return Triplets(left_LR, sigma_R, right_RS, spectrum_of(sigma_R, total, excess, engine))
