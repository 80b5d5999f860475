"""MiLoRA's ablation: triplets drawn randomly (arXiv:2406.09044)."""

from torch import Tensor

from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import Method, Split, split_sigma_evenly


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """Like MiLoRA's, of triplets drawn without replacement, seeded by the seed and the tensor's name."""
    return split_sigma_evenly(solver.random(weight_OI, rank), scale)


METHOD = Method(
    summary="trains singular triplets drawn randomly, an ablation",
    paper="arXiv:2406.09044",
    split=split,
    trains=frozenset({"lora_A", "lora_B"}),
    residual=True,
    spectrum_part="random",
    work="full",
    parallel=False,
    draws=True,
    learning_rate=3e-4,
)
