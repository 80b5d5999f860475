"""The largest entries of tensors in blocks, against sorting."""

import pytest
import torch
from torch import Tensor

from svdconvert.merging.magnitudes import Largest, find_cuts, first_largest

ENTRIES = 1000
VALUES = {
    "normal": torch.randn(ENTRIES, generator=torch.Generator().manual_seed(1)),
    "many equal": torch.randint(-3, 4, (ENTRIES,), generator=torch.Generator().manual_seed(2)).float(),
    "all zero": torch.zeros(ENTRIES),
    "tiny and huge": torch.logspace(-44, 38, ENTRIES) * torch.tensor([1.0, -1.0]).repeat(ENTRIES // 2),
}


def sorted_mask(values: Tensor, count: int) -> Tensor:
    """The `count` largest magnitudes; of equal ones the first."""
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[(-values.abs()).argsort(stable=True)[:count]] = True
    return mask


@pytest.mark.parametrize("count", [0, 1, 7, 500, 999, 1000, 1200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VALUES)
def test_the_largest_entries_are_those_of_sorting(name: str, dtype: torch.dtype, count: int) -> None:
    values = VALUES[name].to(dtype)
    assert torch.equal(first_largest(values.reshape(40, 25), count).reshape(-1), sorted_mask(values, count))


@pytest.mark.parametrize("length", [1, 64, ENTRIES])
def test_blocks_of_several_tensors_are_searched_together(length: int) -> None:
    first, second = VALUES["normal"], VALUES["many equal"]
    blocks = list(zip(first.split(length), second.split(length), strict=True))
    wanted = [(0, 300), (1, 450), (0, 20)]
    masks = [Largest(cut) for cut in find_cuts(blocks, wanted, ENTRIES)]
    for mask, (tensor, count) in zip(masks, wanted, strict=True):
        found = torch.cat([mask(parts[tensor]) for parts in blocks])
        assert torch.equal(found, sorted_mask((first, second)[tensor], count))


def test_entries_that_are_not_numbers_do_not_hang_the_search() -> None:
    values = torch.tensor([float("nan"), 1.0, float("inf"), -2.0])
    assert first_largest(values, 3).sum() <= 3
