"""PiSSA: train the principal singular triplets, freeze the rest (arXiv:2404.02948)."""

from torch import Tensor

from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import Method, Split, split_sigma_evenly


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """B = U_r sqrt(S_r / scale), A = sqrt(S_r / scale) V_r^T of the largest triplets."""
    return split_sigma_evenly(solver.top(weight_OI, rank), scale)


METHOD = Method(
    summary="trains the r largest singular triplets against the residual",
    paper="arXiv:2404.02948",
    split=split,
    trains=frozenset({"lora_A", "lora_B"}),
    residual=True,
    spectrum_part="top",
    dropout_harms=True,
    learning_rate=2e-5,
    # MiLoRA's comparison trains PiSSA at 3e-4; runs of a few hundred steps need as much, see docs/methods.
    other_rates=(2e-4, 5e-4),
)
