"""LoRA: B = 0 and a random A, next to the untouched base (arXiv:2106.09685)."""

from torch import Tensor

from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.methods.base import Method, Split, kaiming, zeros


def split(weight_OI: Tensor, rank: int, scale: float, solver: Solver) -> Split:
    """A uniform in +-sqrt(1 / I), B zero."""
    return Split(Factors(zeros(weight_OI, rank), kaiming(weight_OI, rank, solver)))


METHOD = Method(
    summary="trains an update that starts at zero, next to the untouched base",
    paper="arXiv:2106.09685",
    split=split,
    trains=frozenset({"lora_A", "lora_B"}),
    residual=False,
    work="thin",
    draws=True,
    learning_rate=2e-4,
    other_rates=(2e-5,),  # that of PiSSA's comparison
)
