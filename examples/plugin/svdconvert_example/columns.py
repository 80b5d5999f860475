"""Train the R columns of a matrix that have the largest norms, freeze the others.

A selects R of the inputs and is frozen; B holds the columns of W that belong to them. No SVD is involved.
O: out features, I: in features, R: rank.
"""

import torch
from torch import Tensor

from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import Method, Split


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """A (R, I): rows of the identity; B (O, R): columns of W / scale; scale * B A: these columns of W."""
    weight = weight_OI.float()
    chosen_R = weight.norm(dim=0).topk(rank).indices.sort().values
    selection_RI = torch.zeros(rank, weight.shape[1], device=weight.device)
    selection_RI[torch.arange(rank), chosen_R] = 1.0
    return Split(Factors(weight[:, chosen_R] / scale, selection_RI))


METHOD = Method(
    summary="trains the r columns of W with the largest norms",
    paper="-",
    split=split,
    trains=frozenset({"lora_B"}),
    residual=True,
    spectrum_part="largest columns",
    work="thin",
    learning_rate=1e-4,
)
