"""LoRA: B = 0 and a random A beside the untouched base (arXiv:2106.09685)."""

import torch
from torch import Tensor

from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import Method, Split, kaiming


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """A uniform in +-sqrt(1 / I), B zero."""
    return Split(Factors(torch.zeros(len(weight_OI), rank), kaiming(weight_OI, rank, solver)))


METHOD = Method(
    summary="trains a zero-started update beside the untouched base",
    paper="arXiv:2106.09685",
    split=split,
    trains=frozenset({"lora_A", "lora_B"}),
    residual=False,
    spectrum_part="none",
    learning_rate=2e-4,
)
