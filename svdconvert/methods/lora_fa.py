"""LoRA-FA: A is frozen, so that training stores x A^T of every layer instead of x (arXiv:2308.03303).

It starts from the principal triplets against a residual, with all singular values in B, or, as LoRA does,
from a random A and a zero B next to the untouched base.
"""

from dataclasses import replace

from torch import Tensor

from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.triplets import Triplets
from svdconvert.methods.base import Method, Split, kaiming, zeros


def from_svd(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """The largest triplets."""
    return hold(solver.top(weight_OI, rank), scale)


def hold(triplets: Triplets, scale: float) -> Split:
    """B = U_r S_r / scale, A = V_r^T, whose rows are orthonormal."""
    factors = Factors(triplets.left_OR * (triplets.sigma_R / scale), triplets.right_RI)
    return Split(factors, triplets.spectrum)


def random(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """A as LoRA draws it, B zero."""
    return Split(Factors(zeros(weight_OI, rank), kaiming(weight_OI, rank, solver)))


_SVD = Method(
    summary="trains B alone, so that training stores few of the activations",
    paper="arXiv:2308.03303",
    split=from_svd,
    trains=frozenset({"lora_B"}),
    residual=True,
    hold=hold,
    spectrum_part="top",
    dropout_harms=True,
    learning_rate=2e-4,
    other_rates=(4e-4, 5e-3),  # those of its experiments on GLUE
    init="svd",
)
_RANDOM = replace(
    _SVD,
    split=random,
    residual=False,
    spectrum_part=None,
    work="thin",
    draws=True,
    dropout_harms=False,
    init="random",
)
METHOD = replace(_SVD, variants=(_RANDOM,))
