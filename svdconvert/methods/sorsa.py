"""SORSA: train the principal triplets with their singular values separate from U and V (arXiv:2409.00055).

A and B start with orthonormal rows and columns, and the trainer's penalty keeps them near that.
"""

from torch import Tensor

from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.triplets import Triplets
from svdconvert.methods.base import Method, Split


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """The largest triplets."""
    return hold(solver.top(weight_OI, rank), scale)


def hold(triplets: Triplets, scale: float) -> Split:
    """B = U_r, S = S_r / scale, A = V_r^T."""
    factors = Factors(triplets.left_OR, triplets.right_RI, triplets.sigma_R / scale)
    return Split(factors, triplets.spectrum)


METHOD = Method(
    summary="trains U, S and V of the r largest triplets, U and V orthonormal",
    paper="arXiv:2409.00055",
    split=split,
    trains=frozenset({"lora_A", "lora_B", "lora_S"}),
    residual=True,
    hold=hold,
    spectrum_part="top",
    dropout_harms=True,
    peft_type="SORSA",
    learning_rate=3e-5,
    other_rates=(1e-4,),  # for runs of a few hundred steps
    penalty=0.2,
)
