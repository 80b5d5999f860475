"""Which entries of a change are kept: the largest, those of the middle, or random ones."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from svdconvert.errors import RecipeError
from svdconvert.merging.base import Blocks, Settings
from svdconvert.merging.magnitudes import Largest, find_cuts

_TINY = 1e-7  # an L1 norm that counts as zero

Mask = Callable[[Tensor], Tensor]
"""(a block of a change) -> True for the entries that are kept; called for the blocks in their order."""


def sparsified(blocks: Blocks, settings: Settings, mask: Callable[[int], Mask]) -> Blocks:
    """Every change times the mask of its model; with `rescale` its L1 norm is restored.

    `mask` begins a new pass over the change of a model. A change with density 1 stays as it is.
    """
    sparse = [model for model, density in enumerate(settings.numbers("density")) if density < 1.0]

    def masked() -> Iterator[list[Tensor]]:
        masks = {model: mask(model) for model in sparse}
        for changes in blocks:
            for model in sparse:
                changes[model].mul_(masks[model](changes[model]))
            yield changes

    if not (settings.shared.get("rescale") and sparse):
        return replace(blocks, read=masked)
    before = _sizes(blocks, sparse)
    after = _sizes(replace(blocks, read=masked), sparse)
    factors = {
        model: before[model] / after[model] for model in sparse if min(before[model], after[model]) >= _TINY
    }

    def rescaled() -> Iterator[list[Tensor]]:
        for changes in masked():
            for model, factor in factors.items():
                changes[model].mul_(factor)
            yield changes

    return replace(blocks, read=rescaled)


def _sizes(blocks: Blocks, models: list[int]) -> dict[int, float]:
    """The L1 norms of some changes."""
    sums = dict.fromkeys(models, 0.0)
    for changes in blocks:
        for model in models:
            sums[model] += float(torch.linalg.vector_norm(changes[model], ord=1))
    return sums


def keep_largest(blocks: Blocks, settings: Settings) -> Blocks:
    """The largest entries of every change, at least one (TIES, arXiv:2306.01708, section 4)."""
    densities = settings.numbers("density")
    counts = [max(1, int(density * blocks.entries)) if density > 0.0 else 0 for density in densities]
    cuts = find_cuts(blocks, list(enumerate(counts)), blocks.entries)
    return sparsified(blocks, settings, lambda model: Largest(cuts[model]))


def keep_middle(blocks: Blocks, settings: Settings) -> Blocks:
    """Without the largest share `gamma`, and without the smallest entries (arXiv:2312.06795).

    Fewer of the largest are left out if there would be less than the share `density` otherwise.
    """
    entries = blocks.entries
    wanted = []
    for model, (density, gamma) in enumerate(
        zip(settings.numbers("density"), settings.numbers("gamma"), strict=True)
    ):
        target = int(density * entries)
        smallest = max(0, entries - target - int(gamma * entries))
        wanted += [(model, entries - smallest), (model, entries - smallest - target)]
    cuts = find_cuts(blocks, wanted, entries)

    def mask(model: int) -> Mask:
        kept = Largest(cuts[2 * model])
        outliers = Largest(cuts[2 * model + 1])
        return lambda change: kept(change) & ~outliers(change)

    return sparsified(blocks, settings, mask)


def keep_random(blocks: Blocks, settings: Settings) -> Blocks:
    """Every entry with the probability `density` (DARE, arXiv:2311.03099)."""
    densities = settings.numbers("density")

    def mask(model: int) -> Mask:
        generator = settings.generator(model)
        return lambda change: drawn(change, densities[model], generator)

    return sparsified(blocks, settings, mask)


def drawn(change: Tensor, probability: float | Tensor, generator: torch.Generator) -> Tensor:
    """True with a probability, drawn on the CPU, so that every device gets the same."""
    uniform = torch.rand(change.shape, generator=generator)
    return uniform.to(change.device) < probability


def keep_by_rank(blocks: Blocks, settings: Settings) -> Blocks:
    """Entries with probabilities from density - epsilon to density + epsilon (DELLA, arXiv:2406.11617).

    They grow with the rank of an entry's magnitude in its row. Raises RecipeError for probabilities outside
    of 0 to 1.
    """
    densities = settings.numbers("density")
    epsilons = settings.numbers("epsilon")

    def mask(model: int) -> Mask:
        density = densities[model]
        epsilon = epsilons[model]
        if density <= 0.0:
            return torch.zeros_like
        if not 0.0 < density - epsilon <= density + epsilon < 1.0:
            raise RecipeError(
                f"density {density:g} and epsilon {epsilon:g} give probabilities outside of 0 to 1; choose a "
                "smaller epsilon"
            )
        generator = settings.generator(model)

        def by_rank(change: Tensor) -> Tensor:
            order = change.abs().argsort(dim=-1, stable=True)
            length = change.shape[-1]
            places = torch.arange(length, device=change.device).expand_as(order).contiguous()
            ranks = torch.empty_like(order).scatter_(-1, order, places)
            step = 2.0 * epsilon / max(1, length - 1)
            return drawn(change, density - epsilon + ranks * step, generator)

        return by_rank

    return sparsified(blocks, settings, mask)
