"""Merge methods against dense references in float64, written here with numpy alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from svdconvert.errors import RecipeError
from svdconvert.linalg import blocks
from svdconvert.merging.base import MERGES, Blocks, MergeMethod, Settings
from svdconvert.merging.rank_space import combine_products

ROWS, COLUMNS = 40, 28
RANKS = (3, 5, 2)
WEIGHTS = (0.7, -0.4, 1.5)
DENSITY = 0.6
Dense = Callable[[Sequence[np.ndarray]], np.ndarray]


def products(ranks: Sequence[int] = RANKS, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(ROWS, rank, generator=random), torch.randn(rank, COLUMNS, generator=random))
        for rank in ranks
    ]


def settings_of(method: MergeMethod, models: int = len(RANKS), **given: object) -> Settings:
    each = {"scale": [1.0] * models}
    shared = {}
    for one in method.parameters:
        if one.per_model:
            each[one.name] = list(given.get(one.name, [one.default] * models))
        else:
            shared[one.name] = given.get(one.name, one.default)
    return Settings(shape=(ROWS, COLUMNS), each=each, shared=shared, name="a", seed=1)


def dense_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[np.ndarray]:
    return [(left.double() @ right.double()).numpy() for left, right in pairs]


def merged(name: str, pairs: Sequence[tuple[Tensor, Tensor]], **given: object) -> np.ndarray:
    method = MERGES.get(name)
    left, right = combine_products(method, pairs, settings_of(method, len(pairs), **given))
    return (left @ right).numpy()


def cut(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], sigma[:rank], right[:rank]


def dense_sum(changes: Sequence[np.ndarray]) -> np.ndarray:
    return sum(weight * change for weight, change in zip(WEIGHTS, changes, strict=True))


def dense_mean(changes: Sequence[np.ndarray]) -> np.ndarray:
    return dense_sum(changes) / sum(WEIGHTS)


def dense_tsv(changes: Sequence[np.ndarray]) -> np.ndarray:
    parts = [cut(change, rank) for change, rank in zip(changes, RANKS, strict=True)]
    left = np.concatenate([part[0] for part in parts], axis=1)
    right = np.concatenate([part[2] for part in parts])
    sigma = np.concatenate([weight * part[1] for weight, part in zip(WEIGHTS, parts, strict=True)])
    p, _, q = np.linalg.svd(left, full_matrices=False)
    u, _, v = np.linalg.svd(right, full_matrices=False)
    return (p @ q) @ np.diag(sigma) @ (u @ v)


def dense_iso(changes: Sequence[np.ndarray]) -> np.ndarray:
    left, sigma, right = cut(dense_sum(changes), sum(RANKS))
    return sigma.mean() * left @ right


def dense_knots(changes: Sequence[np.ndarray]) -> np.ndarray:
    left, sigma, right = cut(np.concatenate(changes, axis=1), sum(RANKS))
    parts = [right[:, at * COLUMNS : (at + 1) * COLUMNS] for at in range(len(changes))]
    kept = []
    for part in parts:
        threshold = np.sort(np.abs(part).ravel())[-int(DENSITY * part.size)]
        kept.append(np.where(np.abs(part) >= threshold, part, 0.0))
    weighted = np.stack([weight * part for weight, part in zip(WEIGHTS, kept, strict=True)])
    sign = np.where(weighted.sum(axis=0) >= 0, 1.0, -1.0)
    agrees = np.sign(weighted) == sign
    divisor = (agrees * np.array(WEIGHTS)[:, None, None]).sum(axis=0)
    divisor[divisor == 0] = 1.0
    return left @ np.diag(sigma) @ ((weighted * agrees).sum(axis=0) / divisor)


REFERENCES: dict[str, tuple[Dense, dict[str, object]]] = {
    "sum": (dense_sum, {}),
    "mean": (dense_mean, {}),
    "tsv": (dense_tsv, {}),
    "iso-c": (dense_iso, {}),
    "knots": (dense_knots, {"density": [DENSITY] * 3}),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_method_on_factors_gives_what_the_dense_matrices_give(name: str) -> None:
    reference, given = REFERENCES[name]
    pairs = products()
    expected = reference(dense_of(pairs))
    found = merged(name, pairs, weight=WEIGHTS, **given)
    assert np.linalg.norm(found - expected) < 1e-10 * np.linalg.norm(expected)


ADAPTER_METHODS = [name for name in MERGES.names() if "adapters" in MERGES.get(name).takes]
BY_PRODUCT = [name for name in ADAPTER_METHODS if not name.startswith("peft-") or name.endswith("-svd")]


@pytest.mark.parametrize("name", BY_PRODUCT)
def test_a_merge_depends_on_the_products_and_not_on_their_factors(name: str) -> None:
    if MERGES.get(name).draws:
        pytest.skip("random entries are drawn in bases whose signs the factors decide")
    pairs = products()
    mixers = [torch.randn(rank, rank).double() + 3 * torch.eye(rank).double() for rank in RANKS]
    others = [
        (left.double() @ mixer, torch.linalg.solve(mixer, right.double()))
        for (left, right), mixer in zip(pairs, mixers, strict=True)
    ]
    given = {"weight": WEIGHTS, "density": [DENSITY] * 3}
    one, other = merged(name, pairs, **given), merged(name, others, **given)
    assert np.linalg.norm(one - other) < 1e-9 * np.linalg.norm(one)


@pytest.mark.parametrize("name", ADAPTER_METHODS)
def test_an_adapter_without_the_matrix_changes_nothing_but_a_mean(name: str) -> None:
    if MERGES.get(name).draws or name in ("mean", "tsv"):
        pytest.skip("a mean counts it, TSV divides the rank by the number of adapters")
    pairs = products((4, 4))
    empty = (torch.zeros(ROWS, 0), torch.zeros(0, COLUMNS))
    given = {"density": [DENSITY] * 2}
    more = {"density": [DENSITY] * 3}
    one, other = merged(name, pairs, **given), merged(name, [*pairs, empty], **more)
    assert np.linalg.norm(one - other) < 1e-10 * np.linalg.norm(one)


@pytest.mark.parametrize("name", ADAPTER_METHODS)
def test_one_adapter_with_weight_and_density_one_is_unchanged(name: str) -> None:
    if name == "iso-c":
        pytest.skip("it makes the singular values equal")
    pairs = products((4,))
    expected = dense_of(pairs)[0]
    assert np.linalg.norm(merged(name, pairs) - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ADAPTER_METHODS)
def test_adapters_that_change_nothing_are_combined_to_nothing(name: str) -> None:
    nothing = [(torch.zeros(ROWS, 3), right) for _, right in products((3, 3))]
    assert not merged(name, nothing, density=[DENSITY] * 2).any()


@pytest.mark.parametrize("name", MERGES.names())
def test_every_parameter_changes_the_result(name: str) -> None:
    method = MERGES.get(name)
    random = torch.Generator().manual_seed(3)
    count = 3 if method.most is None else 2
    changes = [torch.randn(ROWS, COLUMNS, generator=random) + 0.3 for _ in range(count)]

    def run(**given: object) -> Tensor:
        if method.factors is not None:
            left, right = combine_products(method, products((4, 4, 4)), settings_of(method, 3, **given))
            return left @ right
        settings = settings_of(method, count, **given)
        if method.weights is None:
            return method.merged_change([change.clone() for change in changes], settings)
        settings = replace(settings, base=0 if name == "slerp" else None)
        (whole,) = method.weights(Blocks.of_matrices(changes), settings)
        return whole

    common = {"density": [DENSITY] * len(changes)} if method.parameter("density") else {}
    if name == "low-rank":
        common["rank"] = 3
    before = run(**common)
    for one in method.parameters:
        if one.name in ("int8_mask", *(["density"] if name.startswith("della") else [])):
            continue
        value = {"rank": 5.0, "density": 0.3}.get(
            one.name, not one.default if isinstance(one.default, bool) else 0.2
        )
        changed = {
            **common,
            one.name: [value, *[one.default] * (len(changes) - 1)] if one.per_model else value,
        }
        if one.name == "gamma":
            changed[one.name] = [0.35] * len(changes)
        assert not torch.equal(run(**changed), before), one.name


@pytest.mark.parametrize("name", [name for name in ADAPTER_METHODS if MERGES.get(name).draws])
def test_a_seed_gives_the_same_entries_again_and_another_seed_others(name: str) -> None:
    method = MERGES.get(name)
    pairs = products((4, 4))
    given = {"density": [DENSITY] * 2}

    def run(seed: int) -> Tensor:
        settings = settings_of(method, 2, **given)
        settings = replace(settings, seed=seed)
        left, right = combine_products(method, pairs, settings)
        return left @ right

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_weights_that_sum_to_zero_have_no_mean() -> None:
    with pytest.raises(RecipeError, match="sum to zero"):
        merged("mean", products((2, 2)), weight=[1.0, -1.0])
    with pytest.raises(RecipeError, match="ranks 2, 3"):
        MERGES.get("peft-ties").rank([2, 3], (ROWS, COLUMNS))


def float32_changes(shape: tuple[int, int], ranks: Sequence[int], seed: int = 3) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    rows, columns = shape
    return [
        (torch.randn(rows, rank, generator=random) @ torch.randn(rank, columns, generator=random))
        for rank in ranks
    ]


def nearest(columns: np.ndarray) -> np.ndarray:
    """The nearest matrix of orthonormal columns, without the directions in which the columns depend."""
    left, sigma, right = np.linalg.svd(columns, full_matrices=False)
    count = int((sigma > 1e-5 * sigma[0]).sum())
    return left[:, :count] @ right[:count]


@pytest.mark.parametrize("shape", [(40, 28), (28, 40), (30, 30)])
@pytest.mark.parametrize("ranks", [(28, 28, 28), (3, 5, 2), (28, 4, 28), (0, 5, 28)])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("block", [100, 10**6])
def test_spectral_methods_take_float32_changes_of_any_rank(
    shape: tuple[int, int],
    ranks: tuple[int, int, int],
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    same: bool,
) -> None:
    """Also changes that span the same directions: no vector of rounding errors is made orthonormal."""
    monkeypatch.setattr(blocks, "_BLOCK", block)
    changes = float32_changes(shape, ranks)
    if same:
        changes[1] = changes[0].clone()
    exact = [change.double().numpy() for change in changes]
    kept = min(shape) // 3
    parts = []
    for change, rank in zip(exact, (ranks[0], ranks[0] if same else ranks[1], ranks[2]), strict=True):
        parts.append(cut(change, min(kept, rank)))
    left = nearest(np.concatenate([part[0] for part in parts], axis=1))
    right = nearest(np.concatenate([part[2] for part in parts]).T)
    sigma = np.concatenate([weight * part[1] for weight, part in zip(WEIGHTS, parts, strict=True)])
    found = {
        name: MERGES.get(name)
        .merged_change(
            [change.clone() for change in changes],
            replace(settings_of(MERGES.get(name), weight=WEIGHTS), shape=shape),
        )
        .double()
        .numpy()
        for name in ("tsv", "iso-c")
    }
    expected = left @ np.diag(sigma) @ right.T
    assert np.linalg.norm(found["tsv"] - expected) < 1e-4 * np.linalg.norm(expected)
    u, s, v = np.linalg.svd(dense_sum(exact), full_matrices=False)
    count = int((s > 1e-5 * s[0]).sum())
    expected = s[:count].mean() * u[:, :count] @ v[:count]
    assert np.linalg.norm(found["iso-c"] - expected) < 1e-4 * np.linalg.norm(expected)
