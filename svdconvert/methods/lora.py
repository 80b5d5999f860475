"""LoRA: B = 0 and a random A beside the untouched base (arXiv:2106.09685)."""

from math import sqrt

import torch
from torch import Tensor

from svdconvert.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.method import Method, Split


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """A uniform in +-sqrt(1 / I) (Kaiming with a = sqrt 5, as PEFT starts it), B zero."""
    rows, columns = weight_OI.shape
    uniform_RI = torch.rand(rank, columns, generator=solver.generator())
    right_RI = (2.0 * uniform_RI - 1.0) / sqrt(columns)
    return Split(Factors(torch.zeros(rows, rank), right_RI))


METHOD = Method(
    summary="trains a zero-started update beside the untouched base",
    paper="arXiv:2106.09685",
    split=split,
    trains=frozenset({"lora_A", "lora_B"}),
    residual=False,
    learning_rate=2e-4,
)
