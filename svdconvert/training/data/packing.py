"""Pack several rows into one sequence, so that batches contain little padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from inspect import signature

import torch
from torch import nn

from svdconvert.errors import RecipeError
from svdconvert.training.data.example import IGNORED, Example


def pack_examples(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Combine examples into sequences of at most `max_length` tokens by best-fit decreasing.

    The longest examples are placed first, each into the fullest sequence that has space for it. The first
    token of an example is not in the loss, so it is never predicted from the example before it.
    """
    packs: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # (free tokens, index into packs), sorted
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        position = bisect_left(free, (size, -1))
        remaining, index = free.pop(position) if position < len(free) else (max_length, len(packs))
        if index == len(packs):
            packs.append([])
        packs[index].append(example)
        insort(free, (remaining - size, index))
    return [_concatenate(parts) for parts in packs]


def _concatenate(parts: Sequence[Example]) -> Example:
    lengths = [len(part.input_ids) for part in parts]
    starts = tuple(sum(lengths[:index]) for index in range(len(parts)))
    labels = torch.cat([part.labels for part in parts])
    labels[list(starts)] = IGNORED
    return Example(torch.cat([part.input_ids for part in parts]), labels, sum(lengths), starts)


def require_packing_support(model: nn.Module) -> None:
    """Raise RecipeError if packed rows would attend to each other in this model.

    The models of transformers and of svdconvert separate rows by position_ids. A model with remote code may
    not, and the recurrent models of transformers take no position_ids.
    """
    is_known = type(model).__module__.startswith(("transformers.models.", "svdconvert.models."))
    if not is_known or "position_ids" not in signature(model.forward).parameters:
        raise RecipeError(f"{type(model).__name__} cannot keep packed rows apart: train without packing")
