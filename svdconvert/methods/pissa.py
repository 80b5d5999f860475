"""PiSSA: train the principal singular triplets, freeze the rest (arXiv:2404.02948)."""

from torch import Tensor

from svdconvert.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.method import Method, Split


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """B = U_r sqrt(S_r / scale), A = sqrt(S_r / scale) V_r^T."""
    top = solver.top(weight_OI, rank)
    root_R = (top.sigma_R / scale).sqrt()
    return Split(Factors(top.left_OR * root_R, root_R[:, None] * top.right_RI), top.spectrum)


METHOD = Method(
    summary="trains the r largest singular triplets against the residual",
    paper="arXiv:2404.02948",
    split=split,
    trains=frozenset({"lora_A", "lora_B"}),
    residual=True,
    learning_rate=2e-5,
)
