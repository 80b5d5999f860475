"""Mix the rows of several data sets in given shares."""

from collections.abc import Sequence
from math import floor

import torch

from svdconvert.errors import DataError
from svdconvert.training.data.example import Example

_MOST_PASSES = 1000  # over one data set, in one pass over the mixture


def mixture_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows one pass over the mixture takes from each data set.

    The shares are `weights`, which sum to 1. The pass is the shortest that contains every row of every data
    set at least once, so rows of the other data sets repeat. Raises DataError if that takes very many rows.
    """
    total = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [max(size, round(weight * total)) for size, weight in zip(sizes, weights, strict=True)]
    for number, (count, size) in enumerate(zip(counts, sizes, strict=True), start=1):
        if count > _MOST_PASSES * size:
            raise DataError(
                f"`data_weights` would repeat the {size} rows of data set {number} {count // size} times in "
                "one pass over the others; give it more rows or a smaller weight"
            )
    return counts


def mix_examples(
    sets: Sequence[Sequence[Example]], weights: Sequence[float] | None, seed: int
) -> list[Example]:
    """The rows of one pass over a mixture: all of them, and as many again as the shares need.

    A row that is taken once more than others of its data set is drawn by `seed`. Without weights every row
    is taken once. The training loop draws the order.
    """
    if weights is None:
        return [example for rows in sets for example in rows]
    generator = torch.Generator().manual_seed(seed)
    mixed: list[Example] = []
    for rows, count in zip(sets, mixture_counts([len(rows) for rows in sets], weights), strict=True):
        passes = floor(count / len(rows))
        drawn = torch.randperm(len(rows), generator=generator)[: count - passes * len(rows)].sort().values
        mixed += [*rows] * passes + [rows[index] for index in drawn.tolist()]
    return mixed
