"""Several rows in one, so that little of a batch is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from inspect import signature

import torch
from torch import nn

from svdconvert.errors import RecipeError
from svdconvert.training.data.example import IGNORED, Example


def pack(rows: Sequence[Example], max_length: int) -> list[Example]:
    """Several rows in one wherever they fit into `max_length` tokens: the longest first, each to the fullest.

    The first token of a row is not predicted from the row before it.
    """
    packs: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the pack), the fullest first
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        need = len(row.input_ids)
        place = bisect_left(room, (need, -1))
        left, number = room.pop(place) if place < len(room) else (max_length, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(row)
        insort(room, (left - need, number))
    return [_joined(parts) for parts in packs]


def _joined(parts: Sequence[Example]) -> Example:
    lengths = [len(part.input_ids) for part in parts]
    starts = tuple(sum(lengths[:index]) for index in range(len(parts)))
    labels = torch.cat([part.labels for part in parts])
    labels[list(starts)] = IGNORED
    return Example(torch.cat([part.input_ids for part in parts]), labels, sum(lengths), starts)


def require_packing(model: nn.Module) -> None:
    """Raise RecipeError where the model would let packed rows see each other.

    transformers' own models and ours keep them apart by their positions; code that a model brings may not,
    and transformers' recurrent models have no positions.
    """
    own = type(model).__module__.startswith(("transformers.models.", "svdconvert.models."))
    if not own or "position_ids" not in signature(model.forward).parameters:
        raise RecipeError(f"{type(model).__name__} cannot keep packed rows apart: train without packing")
