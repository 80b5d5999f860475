"""The rules of PEFT 0.21's `add_weighted_adapter`, on A and B apart or on their product.

PEFT elects the sign of the unweighted sum and divides by the number of models that agree, and its DARE
divides by the density. Methods without the prefix `peft-` have mergekit's rules, which differ in this.
"""

from collections.abc import Callable, Sequence
from math import copysign, sqrt

import torch
from torch import Tensor

from svdconvert.errors import RecipeError
from svdconvert.merging.base import ADAPTERS, MergeMethod, Product, Settings
from svdconvert.merging.magnitudes import first_largest
from svdconvert.merging.parameters import DENSITY, WEIGHT
from svdconvert.merging.sparsity import drawn

Rule = Callable[[Sequence[Tensor], Sequence[float], Settings], Tensor]
"""(tensors, their weights, settings) -> merged tensor."""


def linear(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """sum_t w_t X_t."""
    return torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]).sum(dim=0)


def magnitude_prune(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """The weighted sum of the largest entries."""
    return linear(_largest(tensors, settings), weights, settings)


def ties(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """The mean of the largest entries that have the sign of their unweighted sum."""
    return _elected(_largest(tensors, settings), weights)


def dare_linear(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """The weighted sum of random entries, each divided by the density."""
    return linear(_drawn(tensors, settings), weights, settings)


def dare_ties(tensors: Sequence[Tensor], weights: Sequence[float], settings: Settings) -> Tensor:
    """The mean of random entries that have the sign of their unweighted sum."""
    return _elected(_drawn(tensors, settings), weights)


def on_factors(rule: Rule, summary: str, *, sparse: bool = True, draws: bool = False) -> MergeMethod:
    """A method that merges all A and all B apart, each with the root of weight * scale."""

    def factors(products: Sequence[Product], settings: Settings) -> Product:
        present = [model for model, (left, _) in enumerate(products) if left.shape[1]]
        products = [products[model] for model in present]
        settings = settings.of(present)
        weights = settings.numbers("weight")
        scales = [scale or 1.0 for scale in settings.numbers("scale")]
        roots = [sqrt(abs(weight * scale)) for weight, scale in zip(weights, scales, strict=True)]
        signed = [copysign(root, w * s) for root, w, s in zip(roots, weights, scales, strict=True)]
        left = rule(
            [left.double() / scale for (left, _), scale in zip(products, scales, strict=True)],
            roots,
            settings,
        )
        return left, rule([right.double() for _, right in products], signed, settings)

    return MergeMethod(
        summary=summary,
        paper="PEFT's add_weighted_adapter",
        takes=ADAPTERS,
        parameters=(WEIGHT, DENSITY) if sparse else (WEIGHT,),
        factors=factors,
        rank=_equal_rank,
        draws=draws,
    )


def on_products(rule: Rule, summary: str, *, draws: bool = False) -> MergeMethod:
    """A method that merges the products s B A of one matrix, in memory, and cuts the result by an SVD."""

    def factors(products: Sequence[Product], settings: Settings) -> Product:
        merged = rule(
            [left.double() @ right.double() for left, right in products], settings.numbers("weight"), settings
        )
        outer, sigma, inner = torch.linalg.svd(merged, full_matrices=False)
        return outer[:, : settings.rank] * sigma[: settings.rank], inner[: settings.rank]

    return MergeMethod(
        summary=summary,
        paper="PEFT's add_weighted_adapter",
        takes=ADAPTERS,
        parameters=(WEIGHT, DENSITY),
        factors=factors,
        rank=lambda ranks, shape: min(max(ranks), *shape),
        is_dense=True,
        draws=draws,
    )


def _equal_rank(ranks: Sequence[int], shape: tuple[int, int]) -> int:
    """The rank of all adapters. Raises RecipeError if they differ."""
    if len(set(ranks)) > 1:
        raise RecipeError(
            f"the adapters have the ranks {', '.join(map(str, sorted(set(ranks))))}, and this method adds "
            "factors of one rank entry by entry; use the method that ends in -svd, or sum or ties"
        )
    return ranks[0]


def _largest(tensors: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    return [
        tensor if density >= 1.0 else tensor * first_largest(tensor, int(density * tensor.numel()))
        for tensor, density in zip(tensors, settings.numbers("density"), strict=True)
    ]


def _drawn(tensors: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    kept = []
    for model, (tensor, density) in enumerate(zip(tensors, settings.numbers("density"), strict=True)):
        key = (model, *tensor.shape)  # A and B of one adapter get masks of their own
        is_kept = drawn(tensor, density, settings.generator(key))
        kept.append(tensor if density >= 1.0 else tensor * is_kept / max(density, 1e-9))
    return kept


def _elected(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of w_t X_t over those whose sign is that of sum_t X_t; entries of zero do not count."""
    stacked = torch.stack(list(tensors))
    positive = stacked.sum(dim=0) >= 0
    agrees = torch.where(positive, stacked > 0, stacked < 0)
    factors = torch.tensor(weights, dtype=stacked.dtype).reshape(-1, *[1] * tensors[0].dim())
    return (stacked * factors * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
