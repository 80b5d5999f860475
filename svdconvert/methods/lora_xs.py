"""LoRA-XS: an r x r core between frozen singular vectors, next to the untouched base (arXiv:2405.17604)."""

import torch
from torch import Tensor

from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import Method, Split


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """B = U_r S_r, A = V_r^T, R = 0.

    The paper draws R close to zero. Exact zeros leave the model as it is, and still get a gradient because
    A and B are not zero.
    """
    top = solver.top(weight_OI, rank)
    core_RR = torch.zeros(rank, rank, device=weight_OI.device)
    return Split(Factors(top.left_OR * top.sigma_R, top.right_RI, core_RR), top.spectrum)


METHOD = Method(
    summary="trains an r x r core between frozen singular vectors",
    paper="arXiv:2405.17604",
    split=split,
    trains=frozenset({"lora_R"}),
    residual=False,
    spectrum_part="top",
    peft_type="LORA_XS",
    learning_rate=1e-3,
)
