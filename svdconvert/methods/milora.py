"""MiLoRA: train the smallest singular triplets, keep the principal ones as they are (arXiv:2406.09044)."""

from torch import Tensor

from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import Method, Split, split_sigma_evenly


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """B = U_r sqrt(S_r / scale), A = sqrt(S_r / scale) V_r^T of the smallest triplets."""
    return split_sigma_evenly(solver.bottom(weight_OI, rank), scale)


METHOD = Method(
    summary="trains the r smallest singular triplets against the residual",
    paper="arXiv:2406.09044",
    split=split,
    trains=frozenset({"lora_A", "lora_B"}),
    residual=True,
    spectrum_part="bottom",
    parallel=False,
    residual_dtype="float32",
    learning_rate=3e-4,
)
