"""MiLoRA's ablation: the triplets in the middle of the spectrum (arXiv:2406.09044)."""

from torch import Tensor

from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import Method, Split, split_sigma_evenly


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """Like MiLoRA's, of the r triplets from number (n - r) // 2 on; n is the length of the shorter side."""
    return split_sigma_evenly(solver.middle(weight_OI, rank), scale)


METHOD = Method(
    summary="trains singular triplets in the middle of the spectrum, an ablation",
    paper="arXiv:2406.09044",
    split=split,
    trains=frozenset({"lora_A", "lora_B"}),
    residual=True,
    spectrum_part="middle",
    work="full",
    parallel=False,
    learning_rate=3e-4,
)
