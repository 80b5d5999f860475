"""Applying and converting what an adapter changes, against plain float64 arithmetic."""

import numpy as np
import pytest
import torch
from torch import Tensor

from svdconvert.linalg import blocks as rows_in_work
from svdconvert.linalg.delta import as_lora, merged_, residual_
from svdconvert.linalg.factors import Factors
from tests.stock import same_bits

ROWS, COLUMNS, RANK = 40, 24, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors(seed: int, rank: int = RANK, core: str = "none") -> Factors:
    draw = torch.Generator().manual_seed(seed)
    cores = {
        "none": None,
        "vector": torch.randn(rank, generator=draw),
        "square": torch.randn(rank, rank, generator=draw),
    }
    left, right = torch.randn(ROWS, rank, generator=draw), torch.randn(rank, COLUMNS, generator=draw)
    return Factors(left, right, cores[core])


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)).to(dtype)
    made[::3, ::4] = -0.0
    return made


def product(pieces: Factors, scale: float) -> Tensor:
    left, right = (piece.double() for piece in pieces.folded())
    return scale * left @ right


@pytest.fixture(params=[rows_in_work._BLOCK, 7 * COLUMNS], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices in one block of rows, and in several with a remainder."""
    monkeypatch.setattr(rows_in_work, "_BLOCK", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("core", ["none", "vector", "square"])
@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_rounded_once_and_says_what_that_lost(
    dtype: torch.dtype, kept: torch.dtype, core: str
) -> None:
    before, pieces = weight(dtype), factors(1, core=core)
    found, lost = residual_(before.clone(), pieces, 0.5, kept)
    wanted = before.double() - product(pieces, 0.5)
    assert found.dtype == kept
    assert torch.allclose(found.double(), wanted, rtol=torch.finfo(kept).eps * 0.51, atol=1e-5)
    assert lost == pytest.approx(float(torch.linalg.norm(found.double() - wanted)), rel=0.01, abs=2e-5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("core", ["none", "vector", "square"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_is_added_with_one_rounding(dtype: torch.dtype, core: str) -> None:
    before, start, end = weight(dtype), factors(1, core=core), factors(2, core=core)
    found = merged_(before.clone(), as_lora(end, 0.5, start, 2.0), dtype)[0]
    wanted = before.double() + product(end, 0.5) - product(start, 2.0)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, rtol=torch.finfo(dtype).eps * 0.51, atol=2e-5)
    assert same_bits(before, weight(dtype)), "the weight itself was changed"


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_untrained_adapter_changes_no_bit(dtype: torch.dtype, scale: float) -> None:
    before, start = weight(dtype), factors(1)
    copy = Factors(start.left_OR.clone(), start.right_RI.clone())
    found = merged_(before.clone(), as_lora(copy, scale, start, scale), dtype)[0]
    assert same_bits(found, weight(dtype))
    assert found[0, 0] == 0 and found[0, 0].signbit()


def test_where_only_some_columns_moved_the_others_keep_their_bits() -> None:
    before, start = weight(torch.bfloat16), factors(1)
    right = start.right_RI.clone()
    right[:, 5] += 1
    transposed = as_lora(Factors(start.left_OR, right), 1.0, start, 1.0)
    found = merged_(before.clone(), transposed, torch.bfloat16)[0]
    others = [column for column in range(COLUMNS) if column != 5]
    assert same_bits(found[:, others].contiguous(), before[:, others].contiguous())
    assert not torch.equal(found[:, 5], before[:, 5])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_restored_with_one_rounding(dtype: torch.dtype) -> None:
    residual, pieces = weight(), factors(1)
    left, right = pieces.folded()
    found = merged_(residual.clone(), (left * 0.5, right), dtype)[0]
    wanted = residual.double() + product(pieces, 0.5)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5)
    assert same_bits(residual, weight())


@pytest.mark.parametrize("core", ["none", "vector", "square"])
@pytest.mark.parametrize(("scale", "scale0"), [(1.0, 1.0), (0.5, 2.0)])
def test_a_lora_of_twice_the_rank_is_the_entire_change(core: str, scale: float, scale0: float) -> None:
    start, end = factors(1, core=core), factors(2, core=core)
    left, right = as_lora(end, scale, start, scale0)
    assert left.shape == (ROWS, 2 * RANK) and right.shape == (2 * RANK, COLUMNS)
    wanted = product(end, scale) - product(start, scale0)
    assert torch.allclose(left.double() @ right.double(), wanted, atol=1e-5)


def test_a_zero_start_or_a_frozen_a_needs_no_second_half() -> None:
    start, end = factors(1), factors(2)
    zero = Factors(torch.zeros_like(start.left_OR), start.right_RI)
    left, right = as_lora(end, 0.5, zero, 3.0)
    assert left.shape[1] == RANK
    assert torch.allclose(left.double() @ right.double(), product(end, 0.5), atol=1e-6)
    frozen = Factors(end.left_OR, start.right_RI)
    left, right = as_lora(frozen, 0.5, start, 2.0)
    assert left.shape[1] == RANK
    assert torch.allclose(
        left.double() @ right.double(), product(frozen, 0.5) - product(start, 2.0), atol=1e-5
    )


def test_a_start_of_another_rank_is_subtracted_too() -> None:
    start, end = factors(1, rank=2), factors(2, rank=5)
    left, right = as_lora(end, 1.0, start, 1.0)
    assert left.shape[1] == 7
    assert torch.allclose(left.double() @ right.double(), product(end, 1.0) - product(start, 1.0), atol=1e-5)


def test_a_small_change_survives_rounding_of_the_lora() -> None:
    start = factors(1)
    end = Factors(start.left_OR * 1.001, start.right_RI * 0.999 + 1e-3)
    left, right = (side.bfloat16().double() for side in as_lora(end, 1.0, start, 1.0))
    wanted = product(end, 1.0) - product(start, 1.0)
    lost = torch.linalg.norm(left @ right - wanted) / torch.linalg.norm(wanted)
    assert lost < 0.01, "two large terms that nearly cancel would lose a multiple of the change"


@pytest.mark.parametrize("part", ["all of it", "a part"])
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_what_rounding_leaves_of_an_update_is_what_numpy_says(size: float, part: str) -> None:
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 200, generator=noise).bfloat16()
    change = (size * torch.randn(300, 4, generator=noise), torch.randn(4, 200, generator=noise) / 2)
    stay = (torch.randn(300, 2, generator=noise), torch.randn(2, 200, generator=noise))
    product = (
        change
        if part == "all of it"
        else (torch.cat([change[0], stay[0]], 1), torch.cat([change[1], stay[1]]))
    )
    before = weight.double() if part == "all of it" else weight.double() + stay[0].double() @ stay[1].double()
    found, realised = merged_(
        weight.clone(), product, torch.bfloat16, None if part == "all of it" else change
    )
    intended = (change[0].double() @ change[1].double()).numpy().ravel()
    real = (found.double() - before).numpy().ravel()
    assert realised is not None
    assert realised.size == pytest.approx(np.linalg.norm(intended), rel=1e-4)
    cosine = real @ intended / np.linalg.norm(real) / np.linalg.norm(intended)
    assert realised.cosine == pytest.approx(cosine, abs=1e-3)
    assert realised.kept == pytest.approx(real @ intended / (intended @ intended), abs=5e-3)
    if part == "all of it":
        assert (realised.cosine > 0.95) == (size >= 1e-2)


def test_without_an_update_there_is_nothing_to_say() -> None:
    weight = torch.randn(8, 6).bfloat16()
    assert merged_(weight, (torch.zeros(8, 2), torch.ones(2, 6)), torch.bfloat16)[1] is None


def test_stochastic_rounding_keeps_on_average_what_rounding_to_nearest_swallows() -> None:
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 300, generator=noise).bfloat16()
    change = (1e-4 * torch.randn(400, 2, generator=noise), torch.randn(2, 300, generator=noise))
    _, nearest = merged_(weight.clone(), change, torch.bfloat16)
    _, drawn = merged_(weight.clone(), change, torch.bfloat16, None, torch.Generator().manual_seed(1))
    assert nearest is not None and drawn is not None
    assert nearest.kept < 0.4 < 0.8 < drawn.kept < 1.2
