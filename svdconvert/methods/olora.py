"""OLoRA: train the first columns of Q and rows of R in W = Q R, freeze the rest (arXiv:2406.01775)."""

import torch
from torch import Tensor

from svdconvert.linalg.blocks import times, total_energy
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.triplets import Triplets, spectrum_of
from svdconvert.methods.base import Method, Split


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """B = Q_r, A = R_r / scale.

    The first r columns of Q depend only on the first r columns of W, and R_r = Q_r^T W, so the rest of the
    factorisation is not computed.
    """
    left_OR = torch.linalg.qr(weight_OI[:, :rank].float()).Q
    right_RI = times(weight_OI.T, left_OR).T
    sigma_R = torch.linalg.svdvals(right_RI)
    spectrum = spectrum_of(sigma_R, total_energy(weight_OI), None, "exact")
    return Split(Factors(left_OR, right_RI / scale), spectrum)


def hold(triplets: Triplets, scale: float) -> Split:
    """B = U_r, whose columns are orthonormal as those of Q are, A = S_r V_r^T / scale."""
    right_RI = (triplets.sigma_R / scale)[:, None] * triplets.right_RI
    return Split(Factors(triplets.left_OR, right_RI), triplets.spectrum)


METHOD = Method(
    summary="trains the first columns of Q and rows of R in W = Q R",
    paper="arXiv:2406.01775",
    split=split,
    trains=frozenset({"lora_A", "lora_B"}),
    residual=True,
    hold=hold,
    spectrum_part="first columns",
    work="thin",
    learning_rate=2e-4,
)
