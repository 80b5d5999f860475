"""The 4-bit residual and its factors, against the authors' algorithms restated in float64."""

from dataclasses import replace
from math import sqrt

import pytest
import torch
from torch import Tensor

from svdconvert.linalg.solver import Solver
from svdconvert.manifest.schema import QuantStart
from svdconvert.methods.base import METHODS
from svdconvert.pipeline.quantised_start import Alternation, QuantisedStart, quantised_start, starts_of
from svdconvert.quantization.nf4 import CODE_BOOKS, Rule
from tests.tiny import decaying

RANK = 8
RESIDUAL_METHODS = [name for name in METHODS.names() if METHODS.get(name).residual]


def weights(kind: str = "decaying") -> Tensor:
    torch.manual_seed(3)
    matrix = decaying(96, 160) if kind == "decaying" else torch.randn(96, 160) * 0.02
    return matrix.bfloat16()


def nf4(matrix: Tensor) -> Tensor:
    """NF4 in float64, by the definition: the nearest number of the code book times the block's largest."""
    blocks = matrix.double().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    book = CODE_BOOKS["nf4"].double()
    nearest = (blocks / largest)[..., None].sub(book).abs().argmin(-1)
    return (book[nearest] * largest).reshape(matrix.shape)


def top(matrix: Tensor, rank: int) -> Tensor:
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * sigma[:rank] @ right[:rank]


def reference(weight: Tensor, rank: int, iterations: int, start: QuantStart) -> list[Tensor]:
    """W - Q - B A after every iteration and its truncated SVD, in float64."""
    weight = weight.double()
    update = top(weight, rank) if start == "pissa" else torch.zeros_like(weight)
    errors = []
    for _ in range(iterations):
        rest = weight - nf4(weight - update)
        update = top(rest, rank)
        errors.append(rest - update)
    return errors


def alternation(method: str = "pissa", **values: object) -> Alternation:
    plan = Alternation(
        method=METHODS.get(method),
        rank=RANK,
        scale=1.0,
        solver=Solver("w", "exact64"),
        dtype=torch.float32,
        read_dtype=torch.bfloat16,
        rule=Rule(),
        starts=("pissa", "loftq"),
        iterations=3,
    )
    return replace(plan, **values)  # type: ignore[arg-type]


def error_of(weight: Tensor, found: QuantisedStart, scale: float = 1.0) -> Tensor:
    return weight.double() - found.base.decode().double() - found.factors.dense(scale).double()


@pytest.mark.parametrize("kind", ["decaying", "flat"])
@pytest.mark.parametrize("start", ["pissa", "loftq"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_each_start_ends_as_its_algorithm_with_a_last_svd(
    kind: str, start: QuantStart, iterations: int
) -> None:
    weight = weights(kind)
    found = quantised_start(weight, alternation(starts=(start,), iterations=iterations))
    norms = [float(error.norm()) for error in reference(weight, RANK, iterations, start)]
    assert found.error == pytest.approx(min(norms), rel=5e-3)
    assert found.note.start == start
    assert found.note.iteration == norms.index(min(norms)) + 1 or found.error == pytest.approx(
        norms[-1], 5e-3
    )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("method", RESIDUAL_METHODS)
def test_the_stated_error_is_that_of_what_is_stored(method: str, double: bool) -> None:
    weight = weights()
    plan = alternation(method, rule=Rule(double=double), nuclear=True, scale=2.0)
    found = quantised_start(weight, plan)
    error = error_of(weight, found, 2.0)
    plain = weight.double() - nf4(weight)
    nuclear = 1 - float(torch.linalg.svdvals(error).sum() / torch.linalg.svdvals(plain).sum())
    assert found.error == pytest.approx(float(error.norm()), rel=1e-5)
    assert found.note.reduction == pytest.approx(1 - float(error.norm() / plain.norm()), abs=1e-5)
    assert found.note.nuclear_reduction == pytest.approx(nuclear, abs=1e-5)
    assert found.base.rule == Rule(double=double)


@pytest.mark.parametrize("method", RESIDUAL_METHODS)
def test_the_factors_are_the_best_answer_to_the_last_residual(method: str) -> None:
    weight = weights()
    found = quantised_start(weight, alternation(method))
    rest = weight.double() - found.base.decode().double()
    assert found.error == pytest.approx(float((rest - top(rest, RANK)).norm()), rel=1e-5)


@pytest.mark.parametrize("kind", ["decaying", "flat"])
def test_best_is_the_better_start(kind: str) -> None:
    weight = weights(kind)
    best = quantised_start(weight, alternation())
    each = {
        start: quantised_start(weight, alternation(starts=(start,))).error
        for start in starts_of(METHODS.get("pissa"), "best")
    }
    assert best.error == min(each.values())
    assert best.note.start == min(each, key=each.__getitem__)
    if kind == "decaying":
        assert best.note.start == "pissa"


def test_more_iterations_are_never_worse() -> None:
    weight = weights("flat")
    errors = [quantised_start(weight, alternation(iterations=count)).error for count in (1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True)


def test_a_method_that_starts_at_zero_quantises_the_weight_itself() -> None:
    weight = weights()
    found = quantised_start(weight, alternation("lora", starts=starts_of(METHODS.get("lora"), "best")))
    assert found.note.start is None
    assert found.note.reduction == 0.0
    torch.testing.assert_close(found.base.decode().double(), nf4(weight), rtol=1e-6, atol=1e-9)


def test_a_weight_of_zeros_has_no_error() -> None:
    found = quantised_start(torch.zeros(64, 64, dtype=torch.bfloat16), alternation())
    assert found.error == 0.0
    assert found.note.reduction == 0.0


def test_the_weight_is_not_changed() -> None:
    weight = weights()
    before = weight.clone()
    quantised_start(weight, alternation())
    assert torch.equal(weight, before)


def test_plain_nf4_loses_the_published_share_of_gaussian_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    found = quantised_start(weight, alternation("lora", starts=()))
    assert found.error / sqrt(float(weight.double().square().sum())) == pytest.approx(0.092, abs=2e-3)
