"""What a fine-tuning method is: how it splits a matrix, and which pieces it trains.

O: out features, I: in features, R: rank. A method sees (O, I) matrices in float32 and nothing else;
names, files and dtypes are not its business.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from svdconvert.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.truncated import Spectrum
from svdconvert.registry import Registry


@dataclass(frozen=True, slots=True)
class Split:
    """What a method makes of one matrix: the start of its adapter."""

    factors: Factors
    spectrum: Spectrum | None = None
    """Of the decomposition, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method, as data and a function."""

    summary: str
    """One line for `svdconvert list methods`."""
    paper: str
    """Where it is defined."""
    split: Callable[[Tensor, int, float, Solver], Split]
    """(weight_OI, rank, scale, solver) -> Split, with scale * factors the part taken out of the weight."""
    trains: frozenset[str]
    """The pieces that are trained, of "lora_A", "lora_B", "lora_S", "lora_R"."""
    residual: bool
    """True where the base becomes W - scale * factors; False where it stays as it is."""
    minor: bool = False
    """True for slices as small as bf16 rounding, whose residual is float32 unless told otherwise."""
    peft_type: str = "LORA"
    """As stock PEFT knows it; a name of our own where stock PEFT cannot express the method."""
    learning_rate: float = 2e-4
    """The rate that the paper recommends, the trainer's default."""


METHODS: Registry[Method] = Registry("svdconvert.methods", "METHOD", "method")


def init_folder(method: str) -> str:
    """The folder of a method's initial adapter: pissa_init, lora_fa_init."""
    return method.replace("-", "_") + "_init"
