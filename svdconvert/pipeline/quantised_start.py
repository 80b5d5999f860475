"""A residual in 4 bits, and the factors that are fitted to it.  O: out features, I: in features, R: rank.

The weight W becomes Q + scale * B A, with Q in 4 bits. Two steps alternate: Q quantises W - scale * B A, and
scale * B A becomes the truncated SVD of W - Q. QPiSSA (arXiv:2404.02948, section 4) begins with the method's
factors and ends with a Q; LoftQ (arXiv:2310.08659, algorithm 1) begins with none. Here both end with the
truncated SVD, which is the best answer to the last Q, and of all states the one with the least error is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import tensor_bytes
from svdconvert.linalg.blocks import energy_of, energy_outside, in_float32
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.gemm import matmul_f32
from svdconvert.linalg.solver import Solver
from svdconvert.linalg.triplets import Spectrum
from svdconvert.manifest.fingerprint import Checksum
from svdconvert.manifest.schema import QuantisedMatrix, QuantStart
from svdconvert.methods.base import Method
from svdconvert.quantization.nf4 import Quantized, Rule, aligned_rows, encode, encode_rows


@dataclass(frozen=True, kw_only=True)
class Alternation:
    """How a residual is quantised."""

    method: Method
    rank: int
    scale: float
    solver: Solver
    dtype: torch.dtype
    """Of the stored factors; they are rounded to it before their error is measured."""
    read_dtype: torch.dtype
    """To which the residual is decoded when it is read."""
    rule: Rule
    starts: tuple[QuantStart, ...]
    """Empty for factors whose product is zero: then the weight itself is quantised."""
    iterations: int = 1
    nuclear: bool = False
    """True to measure the nuclear norms too, which takes two full SVDs."""


@dataclass(frozen=True, slots=True)
class QuantisedStart:
    """The best state of an alternation."""

    base: Quantized
    factors: Factors
    """As stored."""
    spectrum: Spectrum | None
    """Of W - Q, whose largest triplets the factors are."""
    error: float
    """||W - Q - scale * B A||_F."""
    note: QuantisedMatrix


@dataclass(frozen=True, slots=True)
class _State:
    start: QuantStart | None
    iteration: int
    base: Quantized
    factors: Factors
    spectrum: Spectrum | None
    error: float


def quantised_start(weight_OI: Tensor, plan: Alternation) -> QuantisedStart:
    """The 4-bit residual and the factors with the smallest error. The weight is not changed."""
    plain = encode(weight_OI, Rule(plan.rule.kind))
    plain_error = missing_norm(weight_OI, plain)
    plain_nuclear = nuclear_norm(difference(weight_OI, plain)) if plan.nuclear else 0.0
    best = min(_states(weight_OI, plan, plain), key=lambda state: state.error)
    nuclear = None
    if plan.nuclear:
        rest_OI = difference(weight_OI, best.base)
        rest_OI.sub_(best.factors.dense(plan.scale))
        nuclear = reduction(nuclear_norm(rest_OI), plain_nuclear)
    note = QuantisedMatrix(
        format=plan.rule.kind,
        double=plan.rule.double,
        start=best.start,
        iteration=best.iteration,
        reduction=reduction(best.error, plain_error),
        checksum=_checksum_as_read(best.base, plan.read_dtype),
        nuclear_reduction=nuclear,
    )
    return QuantisedStart(best.base, best.factors, best.spectrum, best.error, note)


def _states(weight_OI: Tensor, plan: Alternation, plain: Quantized) -> Iterator[_State]:
    """Every state that an alternation reaches; the states of one start follow each other."""
    if not plan.starts:
        yield _unfitted(weight_OI, plan, plain)
    for start in plan.starts:
        factors: Factors | None = None
        if start == "pissa":
            assert plan.method.split is not None
            factors = plan.method.split(weight_OI, plan.rank, plan.scale, plan.solver).factors
        for iteration in range(1, plan.iterations + 1):
            unchanged = factors is None and plan.rule == plain.rule
            base = plain if unchanged else quantise_residual(weight_OI, factors, plan.scale, plan.rule)
            rest_OI = difference(weight_OI, base)
            near = factors.folded() if factors is not None else None
            split = plan.method.hold(plan.solver.top(rest_OI, plan.rank, near), plan.scale)
            factors = split.factors.to(plan.dtype)
            error = _error(rest_OI, factors, plan.scale)
            yield _State(start, iteration, base, factors, split.spectrum, error)


def _unfitted(weight_OI: Tensor, plan: Alternation, plain: Quantized) -> _State:
    """The weight in 4 bits, with the factors of a method that starts at zero."""
    assert plan.method.split is not None
    split = plan.method.split(weight_OI, plan.rank, plan.scale, plan.solver)
    base = plain if plan.rule == plain.rule else encode(weight_OI, plan.rule)
    error = missing_norm(weight_OI, base)
    return _State(None, 0, base, split.factors.to(plan.dtype), split.spectrum, error)


def quantise_residual(weight_OI: Tensor, factors: Factors | None, scale: float, rule: Rule) -> Quantized:
    """W - scale * B A in 4 bits; without factors, W."""
    if factors is None:
        return encode(weight_OI, rule)
    left, right = factors.folded()
    left = left * scale
    right = right.contiguous()

    def rows_of(rows: slice) -> Tensor:
        return weight_OI[rows].float() - matmul_f32(left[rows], right)

    return encode_rows(tuple(weight_OI.shape), rule, weight_OI.device, rows_of)


def difference(weight_OI: Tensor, base: Quantized) -> Tensor:
    """W - Q in float32, (O, I)."""
    rest_OI = torch.empty_like(weight_OI, dtype=torch.float32)
    for rows, part in in_float32(weight_OI):
        torch.sub(part, base.decode(rows), out=rest_OI[rows])
    return rest_OI


def missing_norm(weight_OI: Tensor, base: Quantized) -> float:
    """||W - Q||_F."""
    return sqrt(energy_of(part - base.decode(rows) for rows, part in in_float32(weight_OI)))


def _checksum_as_read(base: Quantized, dtype: torch.dtype) -> str:
    hasher = Checksum()
    for rows in aligned_rows(base.shape[0], base.shape[1], base.rule.blocksize, base.packed.device):
        hasher.update(tensor_bytes(base.decode(rows).to(dtype).cpu()))
    return hasher.text()


def _error(rest_OI: Tensor, factors: Factors, scale: float) -> float:
    left, right = factors.folded()
    return sqrt(energy_outside(rest_OI, left * scale, right.contiguous()))


def norm_of(matrix_OI: Tensor) -> float:
    """The Frobenius norm of a float32 matrix."""
    return sqrt(energy_of(part for _, part in in_float32(matrix_OI)))


def nuclear_norm(matrix_OI: Tensor) -> float:
    """The sum of all singular values of a float32 matrix."""
    return float(torch.linalg.svdvals(matrix_OI).double().sum())


def reduction(error: float, plain_error: float) -> float:
    """By which share an error is smaller than that of plain NF4."""
    return 1.0 - error / plain_error if plain_error > 0.0 else 0.0


def starts_of(method: Method, choice: Literal["best", "pissa", "loftq"]) -> tuple[QuantStart, ...]:
    """What the alternation begins with; nothing if the method's factors start at zero."""
    if not method.residual:
        return ()
    return ("pissa", "loftq") if choice == "best" else (choice,)
