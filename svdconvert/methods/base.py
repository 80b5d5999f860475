"""What a fine-tuning method is: how it splits a matrix, and which factors it trains.

O: out features, I: in features, R: rank. A method gets (O, I) matrices as they are stored, in any float
dtype and on any device, and returns float32 factors on the same device. It knows nothing of names or files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from svdconvert.errors import UnknownNameError, did_you_mean
from svdconvert.linalg.factors import FACTOR_AXES, SIDES, Factors, factor_shapes
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.triplets import Spectrum, Triplets
from svdconvert.plugins import Registry


@dataclass(frozen=True, slots=True)
class Split:
    """What a method makes of one matrix: the initial factors of its adapter."""

    factors: Factors
    spectrum: Spectrum | None = None
    """What is known of the part of the matrix that the factors hold; None if it was not measured."""


def split_sigma_evenly(triplets: Triplets, scale: float) -> Split:
    """B = U sqrt(S / scale), A = sqrt(S / scale) V^T: the singular values on both sides."""
    root_R = (triplets.sigma_R / scale).sqrt()
    return Split(Factors(triplets.left_OR * root_R, root_R[:, None] * triplets.right_RI), triplets.spectrum)


Splitter = Callable[[Tensor, int, float, Solver], Split]
"""(weight_OI, rank, scale, solver) -> Split, with scale * factors the part that is taken out of the weight.

The weight must not be changed. All random numbers come from `solver.generator()`."""

WEIGHT = "weight"
"""What a method without an adapter trains: the matrix itself."""

Work = Literal["thin", "search", "full"]
"""What a split costs: products with R columns, a search for R triplets, or a full SVD."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method, as data and a function."""

    summary: str
    """One line for `svdconvert list methods`."""
    paper: str
    """Where it is defined."""
    split: Splitter | None
    """None if there is no adapter: the matrices themselves are trained."""
    trains: frozenset[str]
    """The factors that are trained, of "lora_A", "lora_B", "lora_S", "lora_R", or WEIGHT alone.

    A and B exist in any case; a core ("lora_S" or "lora_R") exists if it is trained."""
    residual: bool
    """True if the base becomes W - scale * factors; False if it stays as it is, and the factors' product
    must then be zero at the start."""
    hold: Callable[[Triplets, float], Split] = split_sigma_evenly
    """(triplets, scale) -> how the method's factors hold a matrix of low rank."""
    spectrum_part: str | None = None
    """The part of the matrix that the factors are made of, in words; None if there is none.

    If it is "top", "bottom", "middle" or "random", the factors are R of the singular triplets, which the
    tests check. Nothing else depends on the text."""
    work: Work = "search"
    """What a split costs, for the estimate of memory and time."""
    parallel: bool = True
    """True if two matrices may be split at the same time when `--svd` is fast; False if one takes too much
    memory, or profits from `Solver.alone`."""
    draws: bool = False
    """True if the factors depend on the seed even when no triplets are searched for."""
    residual_dtype: Literal["float32"] | None = None
    """The residual's element type unless the user chooses one; None for the base's. float32 is for parts of
    the matrix that are as small as a rounding to bfloat16."""
    dropout_harms: bool = False
    """True if the factors hold principal components of the model, which dropout would take away."""
    peft_type: str = "LORA"
    """PEFT's name of the method; one that PEFT does not know if stock PEFT cannot express the method."""
    learning_rate: float = 2e-4
    """The rate that the paper recommends, and the default of `train`."""
    other_rates: tuple[float, ...] = ()
    """Further rates with known results, of published comparisons or of our recipes: `train` warns of none."""
    penalty: float = 0.0
    """Weight of the penalty that keeps A and B orthonormal, the default of `train`; 0 is none."""
    init: str | None = None
    """The name of this initialisation, if the method has several."""
    variants: tuple["Method", ...] = ()
    """The same method with other initialisations; this one is the default."""

    def variant(self, init: str | None) -> "Method":
        """The method with the initialisation `init`, by default this one. Raises UnknownNameError."""
        if init is None or init == self.init:
            return self
        for other in self.variants:
            if other.init == init:
                return other
        names = [method.init for method in (self, *self.variants) if method.init is not None]
        known = did_you_mean(init, names) if names else "the method has one only"
        raise UnknownNameError(f"there is no init {init!r} for this method; {known}")

    def factor_shapes(self, rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of its factors for a matrix of shape (rows, columns)."""
        shapes = factor_shapes(rows, columns, rank)
        return {name: shapes[name] for name in shapes if name in SIDES or name in self.trains}

    def trained_values(self, rows: int, columns: int, rank: int) -> int:
        """How many values of a matrix of shape (rows, columns) are trained."""
        if WEIGHT in self.trains:
            return rows * columns
        return sum(prod(self.factor_shapes(rows, columns, rank)[name]) for name in self.trains)

    @property
    def trained_formula(self) -> str:
        """`trained_values` in terms of O, I and r."""
        if WEIGHT in self.trains:
            return "O I"
        terms = {"OR": "r O", "RI": "r I", "R": "r", "RR": "r^2"}
        names = [name for name in ("lora_B", *FACTOR_AXES) if name in self.trains]
        return " + ".join(terms[FACTOR_AXES[name]] for name in dict.fromkeys(names))


METHODS: Registry[Method] = Registry("svdconvert.methods", "METHOD", Method)


def init_folder(method: str) -> str:
    """The folder of a method's initial adapter: pissa_init, lora_fa_init."""
    return method.replace("-", "_") + "_init"


def kaiming(weight_OI: Tensor, rank: int, solver: Solver) -> Tensor:
    """An A (R, I) as LoRA draws it: uniform in +-sqrt(1 / I) (Kaiming with a = sqrt 5, PEFT's default).

    Drawn on the CPU, so that every device gets the same numbers.
    """
    columns = weight_OI.shape[1]
    uniform_RI = torch.rand(rank, columns, generator=solver.generator())
    return ((2.0 * uniform_RI - 1.0) / sqrt(columns)).to(weight_OI.device)


def zeros(weight_OI: Tensor, rank: int) -> Tensor:
    """A B (O, R) of zeros, on the weight's device."""
    return torch.zeros(len(weight_OI), rank, device=weight_OI.device)
