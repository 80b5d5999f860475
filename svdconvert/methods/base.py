"""What a fine-tuning method is: how it splits a matrix, and which pieces it trains.

O: out features, I: in features, R: rank. A method sees (O, I) matrices as they are stored, of any float
dtype, and answers in float32; names and files are not its business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from svdconvert.errors import UnknownNameError, did_you_mean
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.triplets import Spectrum, Triplets
from svdconvert.plugins import Registry


@dataclass(frozen=True, slots=True)
class Split:
    """What a method makes of one matrix: the start of its adapter."""

    factors: Factors
    spectrum: Spectrum | None = None
    """Of the part of the matrix that the factors hold, where they hold one."""


Splitter = Callable[[Tensor, int, float, Solver], Split]
"""(weight_OI, rank, scale, solver) -> Split, with scale * factors the part taken out of the weight."""

WEIGHT = "weight"
"""What a method without an adapter trains: the matrix itself."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method, as data and a function."""

    summary: str
    """One line for `svdconvert list methods`."""
    paper: str
    """Where it is defined."""
    split: Splitter | None
    """None where there is no adapter: the matrices themselves are trained."""
    trains: frozenset[str]
    """The pieces that are trained, of "lora_A", "lora_B", "lora_S", "lora_R", or WEIGHT alone."""
    residual: bool
    """True where the base becomes W - scale * factors; False where it stays as it is."""
    spectrum_part: Literal["top", "bottom", "middle", "random", "first columns", "none", "whole"]
    """The part of the matrix that the factors are made of."""
    peft_type: str = "LORA"
    """As stock PEFT knows it; a name of our own where stock PEFT cannot express the method."""
    learning_rate: float = 2e-4
    """The rate that the paper recommends, the trainer's default."""
    penalty: float = 0.0
    """Weight of the penalty that keeps A and B orthonormal, the trainer's default; 0 is none."""
    init: str | None = None
    """The name of this way to start, where the method has several."""
    variants: tuple["Method", ...] = ()
    """The same method started in other ways; this one is its default."""

    def variant(self, init: str | None) -> "Method":
        """The method with the start called `init`, by default its own. Raises UnknownNameError."""
        if init is None or init == self.init:
            return self
        for other in self.variants:
            if other.init == init:
                return other
        names = [way.init for way in (self, *self.variants) if way.init is not None]
        known = did_you_mean(init, names) if names else "the method has one only"
        raise UnknownNameError(f"there is no init {init!r} for this method; {known}")

    def trained_values(self, rows: int, columns: int, rank: int) -> int:
        """How many values are trained of a matrix of shape (rows, columns)."""
        sizes = {"lora_A": rank * columns, "lora_B": rows * rank, "lora_S": rank, "lora_R": rank * rank}
        return sum(rows * columns if piece == WEIGHT else sizes[piece] for piece in self.trains)

    @property
    def trained_formula(self) -> str:
        """`trained_values` in terms of O, I and r."""
        if WEIGHT in self.trains:
            return "O I"
        pieces = (("lora_B", "r O"), ("lora_A", "r I"), ("lora_S", "r"), ("lora_R", "r^2"))
        return " + ".join(term for piece, term in pieces if piece in self.trains)


METHODS: Registry[Method] = Registry("svdconvert.methods", "METHOD", Method)


def init_folder(method: str) -> str:
    """The folder of a method's initial adapter: pissa_init, lora_fa_init."""
    return method.replace("-", "_") + "_init"


def kaiming(weight_OI: Tensor, rank: int, solver: Solver) -> Tensor:
    """An A (R, I) as LoRA draws it: uniform in +-sqrt(1 / I) (Kaiming with a = sqrt 5, as PEFT starts it)."""
    columns = weight_OI.shape[1]
    uniform_RI = torch.rand(rank, columns, generator=solver.generator())
    return (2.0 * uniform_RI - 1.0) / sqrt(columns)


def split_sigma_evenly(slice_: Triplets, scale: float) -> Split:
    """B = U sqrt(S / scale), A = sqrt(S / scale) V^T: a slice with its singular values on both sides."""
    root_R = (slice_.sigma_R / scale).sqrt()
    return Split(Factors(slice_.left_OR * root_R, root_R[:, None] * slice_.right_RI), slice_.spectrum)
