"""Products in their joint row and column space, in float64."""

import torch

from svdconvert.linalg.joint_space import joint_space


def products(*ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(30, rank, generator=random, dtype=torch.float64),
            torch.randn(rank, 20, generator=random, dtype=torch.float64),
        )
        for rank in ranks
    ]


def test_the_cores_and_bases_are_the_products() -> None:
    pairs = products(3, 5, 1)
    left, cores, right = joint_space(pairs)
    assert torch.allclose(left.T @ left, torch.eye(9, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(right @ right.T, torch.eye(9, dtype=torch.float64), atol=1e-12)
    for (one, other), core in zip(pairs, cores, strict=True):
        assert torch.allclose(left @ core @ right, one @ other, atol=1e-12)


def test_the_space_is_no_larger_than_the_products_need() -> None:
    one, other = products(3, 2)
    left, cores, right = joint_space([one, one, other, (one[0] * 2, one[1])])
    assert left.shape == (30, 5) and right.shape == (5, 20) and cores[0].shape == (5, 5)
    wide = products(25, 25)
    left, cores, right = joint_space(wide)
    assert left.shape[1] <= 30 and right.shape[0] <= 20
    assert torch.allclose(left @ cores[1] @ right, wide[1][0] @ wide[1][1], atol=1e-10)


def test_products_that_are_zero_have_no_space() -> None:
    left, cores, right = joint_space([(torch.zeros(4, 2).double(), torch.ones(2, 3).double())])
    assert left.shape == (4, 0) and cores[0].shape == (0, 0) and right.shape == (0, 3)


def test_the_bases_do_not_depend_on_how_a_product_is_factored() -> None:
    pairs = products(3, 4)
    mixer = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixed = (pairs[1][0] @ mixer, torch.linalg.solve(mixer, pairs[1][1]))
    left, _, right = joint_space(pairs)
    other_left, _, other_right = joint_space([pairs[0], mixed])
    for one, other in ((left.T, other_left.T), (right, other_right)):
        signs = (one * other).sum(dim=1).sign()
        assert torch.allclose(one, other * signs[:, None], atol=1e-8)
