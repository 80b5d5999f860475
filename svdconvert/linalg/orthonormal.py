"""Orthonormal bases of thin blocks.  N: rows, B: columns, K: columns of a basis."""

import torch
from torch import Tensor

_THIN = 1e-10  # of the largest eigenvalue of a Gram matrix: below, Householder's reflections are used
_FLAT = 1e-4  # above, a product in float32 keeps the vectors orthonormal
_MIXED = 1e-4  # a share of the basis in a unit vector that can be subtracted without changing its length


def orthonormal(block_NB: Tensor) -> Tensor:
    """An orthonormal basis of the block's columns, in its dtype; also where they are dependent.

    Cholesky QR with the Gram matrix in float64, which costs three thin products; Householder QR where
    the condition number of the Gram matrix asks for it.
    """
    wide_NB = block_NB.double()
    factor_BB, failed = torch.linalg.cholesky_ex(wide_NB.T @ wide_NB)
    pivots = factor_BB.diagonal()
    if int(failed) or not float(pivots.min()) ** 2 > _THIN * float(pivots.max()) ** 2:
        return householder(block_NB)
    basis: Tensor = torch.linalg.solve_triangular(factor_BB.T, wide_NB, upper=True, left=False)
    return basis.to(block_NB.dtype)


def ordered(block_NB: Tensor) -> Tensor:
    """The same, with columns in the order of falling singular values (SVQB, Stathopoulos and Wu 2002).

    Multiplied next, such columns lose to rounding in proportion to their own singular value; the
    columns of Cholesky QR all lose in proportion to the largest.
    """
    squares_B, mix_BB = gram_eigen(block_NB)
    if not float(squares_B[-1]) > _THIN * float(squares_B[0]):
        return householder(block_NB)
    return turned(block_NB, squares_B, mix_BB)


def gram_eigen(block_NB: Tensor) -> tuple[Tensor, Tensor]:
    """(squares, mix): the eigenvalues of the Gram matrix, falling, and its eigenvectors, in float64."""
    wide_NB = block_NB.double()
    squares_B, mix_BB = torch.linalg.eigh(wide_NB.T @ wide_NB)
    return squares_B.flip(0), mix_BB.flip(1)


def turned(block_NB: Tensor, squares_B: Tensor, mix_BB: Tensor) -> Tensor:
    """The left singular vectors of a block, in its dtype, of what `gram_eigen` gave."""
    turn_BB = mix_BB / squares_B.sqrt()
    if float(squares_B[-1]) > _FLAT * float(squares_B[0]):
        return block_NB @ turn_BB.to(block_NB.dtype)
    return (block_NB.double() @ turn_BB).to(block_NB.dtype)


def householder(block_NB: Tensor) -> Tensor:
    """An orthonormal basis by reflections: slower, and safe for any block."""
    basis: Tensor = torch.linalg.qr(block_NB).Q
    return basis


def polished(block_NB: Tensor) -> Tensor:
    """A block that is orthonormal but for some rounding, without it: one step of Newton and Schulz."""
    gram_BB = block_NB.T @ block_NB
    step_BB = torch.eye(len(gram_BB), dtype=gram_BB.dtype, device=gram_BB.device).mul_(1.5).sub_(gram_BB / 2)
    return block_NB @ step_BB


def complement(rest_NB: Tensor, basis_KN: Tensor) -> Tensor:
    """An orthonormal block, orthogonal to the rows of `basis_KN`, of what a first projection left.

    Rounding has mixed the basis in again, the more the less was left, so the block is projected again
    ("twice is enough"), and once more where that was much; where nothing is left, the columns are
    arbitrary.
    """
    block_NB = ordered(rest_NB)
    for _ in range(3):
        shares_KB = basis_KN @ block_NB
        block_NB = torch.addmm(block_NB, basis_KN.T, shares_KB, alpha=-1)
        if float(shares_KB.abs().max()) < _MIXED:
            break
        block_NB = householder(block_NB)
    return block_NB
