"""A space says the same of itself, whenever it was looked at before."""

import pytest
import torch

from svdconvert.linalg.krylov import Krylov, Ritz, warm_start


def looked_at(widths: list[int]) -> Ritz:
    """The last of some looks at a growing space, after that many blocks each."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = (1.0 / torch.arange(1, 201))[:, None]
    start = torch.randn(200, 8, generator=generator)
    space = Krylov(lambda block: eigenvalues * block, warm_start(lambda x: eigenvalues * x, start, 1), 80)
    for width in widths:
        space.grow(width - space.width // 8)
        ritz = space.ritz(16)
    return ritz


@pytest.mark.parametrize("earlier", [[4], [3], [3, 4]])
def test_what_a_space_held_a_block_earlier_does_not_hang_on_earlier_looks(earlier: list[int]) -> None:
    alone, after = looked_at([5]), looked_at([*earlier, 5])
    assert torch.allclose(after.before_R, alone.before_R, rtol=1e-6)
    assert torch.allclose(alone.before_R, looked_at([4]).values_R, rtol=1e-6)
    assert (alone.values_R > alone.before_R).any()
