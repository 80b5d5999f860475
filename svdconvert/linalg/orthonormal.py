"""Orthonormal bases of thin blocks.  N: rows, B: columns, K: columns of a basis."""

from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.linalg.blocks import held_by_float32, total_energy
from svdconvert.linalg.gemm import matmul_f32

_NEAR = 0.3  # smallest pivot, relative to the largest, of a nearly orthonormal block
_THIN = 1e-10  # of the largest eigenvalue of a Gram matrix: below it, Householder QR is used
# Of the energy of the columns that an eigenvector mixes: a smaller eigenvalue is the result of cancellation.
_DEPENDENT = 0.1
_MIXED = 1e-4  # component along the basis that can be subtracted from a unit vector without changing its norm


def orthonormal(block_NB: Tensor) -> Tensor:
    """An orthonormal basis of the block's columns, in its dtype, even if they are dependent.

    Cholesky QR with the Gram matrix in float64, which costs three thin products; Householder QR if the
    Gram matrix is too ill-conditioned.
    """
    wide_NB = block_NB.double()
    factor_BB, failed = torch.linalg.cholesky_ex(wide_NB.T @ wide_NB)
    pivots = factor_BB.diagonal()
    if int(failed) or not float(pivots.min()) ** 2 > _THIN * float(pivots.max()) ** 2:
        return householder(block_NB)
    basis: Tensor = torch.linalg.solve_triangular(factor_BB.T, wide_NB, upper=True, left=False)
    return basis.to(block_NB.dtype)


def svqb(block_NB: Tensor) -> Tensor:
    """The same, with columns in the order of descending singular values (SVQB, Stathopoulos and Wu 2002).

    In the next product, the rounding error of such a column is in proportion to its singular value; with
    Cholesky QR the errors of all columns are in proportion to the largest.
    """
    turn = gram_eigen(block_NB)
    if not float(turn.squares_B[-1]) > _THIN * float(turn.squares_B[0]):
        return householder(block_NB)
    return turn.left(block_NB)


@dataclass(frozen=True, slots=True)
class GramEigen:
    """Of a block (N, B), in float64."""

    squares_B: Tensor
    """The eigenvalues of its Gram matrix, descending: the squares of its singular values."""
    mix_BB: Tensor
    """The eigenvectors: its right singular vectors, as columns."""
    independent: bool
    """True if float32 gives all of that, and the left vectors, to 1e-5."""

    def left(self, block_NB: Tensor) -> Tensor:
        """The left singular vectors of the block, in its dtype."""
        dtype = block_NB.dtype if self.independent else torch.float64
        turn_BB = (self.mix_BB / self.squares_B.sqrt()).to(dtype)
        return matmul_f32(block_NB.to(dtype), turn_BB).to(block_NB.dtype)


def gram_eigen(block_NB: Tensor) -> GramEigen:
    """The eigenvalues and eigenvectors of a block's Gram matrix.

    The columns are multiplied in float32. The error of an entry is a rounding of the product of the two
    columns' norms, and that of an eigenvalue a rounding of the energy of the columns that its vector mixes.
    If that is not small next to the eigenvalue, because columns are nearly dependent, float64 is used.
    """
    if block_NB.dtype == torch.float32:
        gram_BB = matmul_f32(block_NB.T, block_NB).double()
        energy = total_energy(block_NB)
        if held_by_float32(energy):
            gram_BB *= energy / gram_BB.trace()  # as energies are subtracted from one another
            squares_B, mix_BB = _descending(gram_BB)
            mixed_B = (mix_BB.square() * gram_BB.diagonal()[:, None]).sum(0)
            if bool((squares_B > _DEPENDENT * mixed_B).all()):
                return GramEigen(squares_B, mix_BB, independent=True)
    wide_NB = block_NB.double()
    return GramEigen(*_descending(wide_NB.T @ wide_NB), independent=False)


def _descending(symmetric_BB: Tensor) -> tuple[Tensor, Tensor]:
    values_B, vectors_BB = torch.linalg.eigh(symmetric_BB)
    return values_B.flip(0), vectors_BB.flip(1)


def householder(block_NB: Tensor) -> Tensor:
    """An orthonormal basis by reflections: slower, but safe for any block."""
    basis: Tensor = torch.linalg.qr(block_NB).Q
    return basis


def orthonormal_again(block_NB: Tensor) -> Tensor:
    """An orthonormal basis of a block whose columns are nearly orthonormal, to its dtype's rounding.

    Cholesky QR with a Gram matrix in the block's dtype, and one Newton-Schulz step, which removes what
    rounding has added. A block that is not what it should be is given to `orthonormal`.
    """
    gram_BB = matmul_f32(block_NB.T, block_NB).double()
    factor_BB, failed = torch.linalg.cholesky_ex(gram_BB)
    pivots = factor_BB.diagonal()
    if int(failed) or not float(pivots.min()) > _NEAR * float(pivots.max()):
        return orthonormal(block_NB)
    eye_BB = torch.eye(len(gram_BB), dtype=gram_BB.dtype, device=gram_BB.device)
    turn_BB = torch.linalg.solve_triangular(factor_BB.T, eye_BB, upper=True)
    block_NB = matmul_f32(block_NB, turn_BB.to(block_NB.dtype))
    gram_BB = matmul_f32(block_NB.T, block_NB)
    return matmul_f32(block_NB, eye_BB.to(gram_BB).mul_(1.5).sub_(gram_BB / 2))


def complement(block_NB: Tensor, basis_KN: Tensor) -> Tensor:
    """An orthonormal block, orthogonal to the rows of `basis_KN`.

    `block_NB` is an orthonormal basis of what a first projection left. The smaller that was, the larger the
    components along the basis that rounding has left in it. So the block is projected again ("twice is
    enough"), and once more if those components were large. If nothing remains, the columns are arbitrary.
    """
    for _ in range(3):
        shares_KB = matmul_f32(basis_KN, block_NB)
        block_NB = block_NB - matmul_f32(basis_KN.T, shares_KB)
        if float(shares_KB.abs().max()) < _MIXED:
            break
        block_NB = householder(block_NB)
    return block_NB
