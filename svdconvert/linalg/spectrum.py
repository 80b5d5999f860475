"""The whole spectrum of a matrix, and what describes it.  S: the shorter side, squares descending."""

from math import exp, sqrt

import torch
from torch import Tensor

from svdconvert.linalg.blocks import gram, held_by_float32

_SMALL = 1024  # the shorter side up to which float64 costs little


def squares_of(matrix_OI: Tensor, energy: float) -> Tensor:
    """The squared singular values (S,), descending, in float64; `energy` is ||matrix||_F^2.

    From the Gram matrix of the shorter side: values below 1e-7 of the largest square are rounding.
    """
    matrix_LS = matrix_OI if matrix_OI.shape[0] >= matrix_OI.shape[1] else matrix_OI.T
    exact = matrix_LS.shape[1] <= _SMALL or not held_by_float32(energy)
    values = torch.linalg.eigvalsh(gram(matrix_LS, torch.float64 if exact else torch.float32))
    squares_S: Tensor = values.double().flip(0).clamp_min(0.0).cpu()
    return squares_S


def stable_rank(squares_S: Tensor) -> float:
    """||W||_F^2 / sigma_1^2; 0 for a zero matrix."""
    total = float(squares_S.sum())
    return total / float(squares_S[0]) if total else 0.0


def effective_rank(squares_S: Tensor) -> float:
    """exp of the entropy of sigma^2 / ||W||_F^2 (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = float(squares_S.sum())
    if not total:
        return 0.0
    shares = squares_S[squares_S > 0] / total
    return exp(-float((shares * shares.log()).sum()))


def rank_for_energy(squares_S: Tensor, share: float) -> int:
    """The smallest rank that holds this share of ||W||_F^2; 0 for a zero matrix."""
    total = float(squares_S.sum())
    if not total:
        return 0
    return min(len(squares_S), int((squares_S.cumsum(0) < share * total).sum()) + 1)


def error_of_rank(squares_S: Tensor, rank: int) -> float:
    """||W - W_r||_F for the best approximation of this rank."""
    return sqrt(float(squares_S[rank:].sum()))
