"""Which entries of a change are kept: the largest, those of the middle, or random ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from svdconvert.errors import RecipeError
from svdconvert.merging.base import Settings

_TINY = 1e-7  # an L1 norm that counts as zero


def sparsified(
    changes: Sequence[Tensor], settings: Settings, mask: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """Every change times `mask(change, model)`; with `rescale` its L1 norm is restored.

    A change with density 1 stays as it is; others are overwritten.
    """
    kept = []
    for model, change in enumerate(changes):
        if settings.numbers("density")[model] >= 1.0:
            kept.append(change)
            continue
        rescales = bool(settings.shared.get("rescale"))
        before = float(torch.linalg.vector_norm(change, ord=1)) if rescales else 0.0
        sparse = change.mul_(mask(change, model))
        if rescales:
            after = float(torch.linalg.vector_norm(sparse, ord=1))
            if min(before, after) >= _TINY:
                sparse.mul_(before / after)
        kept.append(sparse)
    return kept


def largest(change: Tensor, density: float) -> Tensor:
    """True for the share `density` of the entries with the largest magnitudes, at least one."""
    if density <= 0.0 or not change.numel():
        return torch.zeros_like(change, dtype=torch.bool)
    return first_largest(change, max(1, int(density * change.numel())))


def keep_largest(changes: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """The largest entries of every change (TIES, arXiv:2306.01708, section 4)."""
    densities = settings.numbers("density")
    return sparsified(changes, settings, lambda change, model: largest(change, densities[model]))


def keep_middle(changes: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """Without the largest share `gamma`, and without the smallest entries (arXiv:2312.06795).

    Fewer of the largest are left out if there would be less than the share `density` otherwise.
    """
    densities = settings.numbers("density")
    gammas = settings.numbers("gamma")

    def mask(change: Tensor, model: int) -> Tensor:
        count = change.numel()
        target = int(densities[model] * count)
        smallest = max(0, count - target - int(gammas[model] * count))
        above = torch.zeros_like(change, dtype=torch.bool) if smallest + target >= count else None
        outliers = first_largest(change, count - smallest - target) if above is None else above
        return first_largest(change, count - smallest) & ~outliers

    return sparsified(changes, settings, mask)


def keep_random(changes: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """Every entry with the probability `density` (DARE, arXiv:2311.03099)."""
    densities = settings.numbers("density")
    return sparsified(
        changes, settings, lambda change, model: drawn(change, densities[model], settings, model)
    )


def drawn(change: Tensor, probability: float | Tensor, settings: Settings, key: object) -> Tensor:
    """True with a probability, drawn on the CPU, so that every device gets the same."""
    uniform = torch.rand(change.shape, generator=settings.generator(key))
    return uniform.to(change.device) < probability


def keep_by_rank(changes: Sequence[Tensor], settings: Settings) -> list[Tensor]:
    """Entries with probabilities from density - epsilon to density + epsilon (DELLA, arXiv:2406.11617).

    They grow with the rank of an entry's magnitude in its row. Raises RecipeError for probabilities outside
    of 0 to 1.
    """
    densities = settings.numbers("density")
    epsilons = settings.numbers("epsilon")

    def mask(change: Tensor, model: int) -> Tensor:
        density = densities[model]
        epsilon = epsilons[model]
        if density <= 0.0:
            return torch.zeros_like(change, dtype=torch.bool)
        if not 0.0 < density - epsilon <= density + epsilon < 1.0:
            raise RecipeError(
                f"density {density:g} and epsilon {epsilon:g} give probabilities outside of 0 to 1; choose a "
                "smaller epsilon"
            )
        order = change.abs().argsort(dim=-1, stable=True)
        length = change.shape[-1]
        ranks = torch.empty_like(order).scatter_(
            -1, order, torch.arange(length).expand_as(order).contiguous()
        )
        lowest = density - epsilon
        return drawn(change, lowest + ranks * (2.0 * epsilon / max(1, length - 1)), settings, model)

    return sparsified(changes, settings, mask)


def first_largest(change: Tensor, count: int) -> Tensor:
    """True for the `count` entries of largest magnitude; of equal ones the first."""
    flat = change.reshape(-1)
    if count >= flat.numel():
        return torch.ones_like(change, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(change, dtype=torch.bool)
    threshold = _threshold(flat, flat.numel() - count)
    kept = (flat > threshold) | (flat < -threshold)
    missing = count - int(kept.count_nonzero())
    equal = ((flat == threshold) | (flat == -threshold)).nonzero().reshape(-1)
    kept[equal[:missing]] = True
    return kept.reshape(change.shape)


def _threshold(flat: Tensor, position: int) -> float:
    """The magnitude at a position in ascending order. numpy takes a third of the time of torch's kthvalue."""
    magnitudes = flat.abs()
    if flat.device.type != "cpu":
        return float(magnitudes.kthvalue(position + 1).values)
    values = magnitudes.numpy()
    values.partition(position)
    return float(values[position])
