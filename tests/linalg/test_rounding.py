"""Stochastic rounding takes one of the two neighbours, and the exact number on average."""

import pytest
import torch

from svdconvert.linalg.rounding import stochastic

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@HALVES
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e3])
def test_every_entry_is_one_of_its_neighbours(dtype: torch.dtype, scale: float) -> None:
    exact = scale * torch.randn(5000, generator=generator(1))
    found = stochastic(exact, dtype, generator()).float()
    nearest = exact.to(dtype)
    steps = {
        float(way): torch.nextafter(nearest.bfloat16(), torch.tensor(way).bfloat16()) for way in (-1e38, 1e38)
    }
    if dtype == torch.bfloat16:
        known = torch.stack([nearest.float(), *(step.float() for step in steps.values())])
        assert (known == found).any(0).all()
    spacing = (
        torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )
    assert ((found - exact).abs() <= spacing).all()
    assert (found != nearest.float()).any()


@HALVES
def test_the_mean_is_the_exact_number(dtype: torch.dtype) -> None:
    for exact in (1.0 + 1e-3, -0.3337, 1e-7, -65.06):
        drawn = stochastic(torch.full((40000,), exact), dtype, generator()).double()
        spread = float(drawn.std()) / 200.0
        assert abs(float(drawn.mean()) - exact) < 5.0 * spread + 1e-7 * abs(exact)
        assert len(set(drawn.tolist())) == 2


@HALVES
def test_what_needs_no_rounding_stays_as_it_is(dtype: torch.dtype) -> None:
    exact = torch.cat(
        [torch.randn(1000).to(dtype), torch.tensor([0.0, -0.0, torch.finfo(dtype).max]).to(dtype)]
    )
    found = stochastic(exact.float(), dtype, generator())
    assert torch.equal(found.view(torch.int16), exact.view(torch.int16))
    odd = stochastic(torch.tensor([torch.inf, -torch.inf, torch.nan]), dtype, generator())
    assert odd[0] == torch.inf and odd[1] == -torch.inf and odd[2].isnan()


def test_the_same_seed_rounds_alike_and_another_does_not() -> None:
    exact = torch.randn(1000)
    one, same, other = (stochastic(exact, torch.bfloat16, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
