"""A key-value cache that appends in place.  B: rows, H: heads, T: tokens, D: size of a head.

transformers' own cache copies all keys and values for every new token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 128  # tokens that are added to the buffers at a time


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The keys and values of one layer, (B, H, T, D), as views of buffers with room for more tokens."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if not self._buffers or after > self._buffers[0].shape[-2]:
            room = after + _ROOM if before else after
            self._buffers = [
                _with_room(old, new, before, room)
                for old, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:after] = new
        self.keys, self.values = (buffer[:, :, :after] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch; only those that change their place are copied."""
        if not self.is_initialized:
            return
        count = len(indices)
        length = self.get_seq_length()
        places = torch.arange(count, device=indices.device)
        moved = places[indices != places]
        for buffer in self._buffers:
            buffer[moved, :, :length] = buffer[indices[moved], :, :length]
        self._buffers = [buffer[:count] for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _with_room(old: Tensor | None, new: Tensor, count: int, room: int) -> Tensor:
    """A buffer for `room` tokens that begins with `count` tokens of `old`."""
    batch, heads, _, size = new.shape
    buffer = new.new_empty(batch, heads, room, size)
    if count and old is not None:
        buffer[:, :, :count] = old[:, :, :count]
    return buffer


def is_plain(network: Any) -> bool:
    """True if the network's cache holds only keys and values, all of them or those of a sliding window."""
    if getattr(network, "_is_stateful", False):
        return False
    kinds = {type(layer) for layer in DynamicCache(config=network.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}


def new_cache(network: Any) -> DynamicCache:
    """An empty cache for a network whose cache `is_plain`."""
    cache = DynamicCache(config=network.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def repeated(cache: DynamicCache, network: Any, count: int) -> DynamicCache:
    """A cache of `count` rows, each with what the single row of `cache` holds."""
    copy = new_cache(network)
    layers: Any = cache.layers
    for number, layer in enumerate(layers):
        if layer.keys is None or layer.values is None:
            continue
        keys, values = (part.expand(count, -1, -1, -1) for part in (layer.keys, layer.values))
        copy.update(keys, values, number)
        if hasattr(layer, "cumulative_length"):
            vars(copy.layers[number])["cumulative_length"] = layer.cumulative_length
    return copy


def joined(parts: Sequence[DynamicCache], network: Any, shared: int) -> DynamicCache:
    """One cache with the rows of all `parts`, which are emptied.

    All rows become as long as the longest: padding follows their first `shared` tokens.
    """
    if len(parts) == 1:
        return parts[0]
    whole = new_cache(network)
    taken: Any = [part.layers for part in parts]
    for number in range(len(taken[0])):
        layers = [each[number] for each in taken]
        if layers[0].keys is None or layers[0].values is None:
            continue
        keys = _aligned([layer.keys for layer in layers], shared)
        values = _aligned([layer.values for layer in layers], shared)
        for each in taken:
            each[number] = None
        whole.update(keys, values, number)
        if hasattr(layers[0], "cumulative_length"):
            longest = max(layer.cumulative_length for layer in layers)
            vars(whole.layers[number])["cumulative_length"] = longest
    return whole


def _aligned(parts: Sequence[Tensor], shared: int) -> Tensor:
    """The rows of all parts (B, H, T, D), with zeros between their beginning and what follows."""
    length = max(part.shape[2] for part in parts)
    padded = [part.new_zeros(*part.shape[:2], length - part.shape[2], part.shape[3]) for part in parts]
    return torch.cat(
        [
            torch.cat([part[:, :, :shared], pad, part[:, :, shared:]], 2)
            for part, pad in zip(parts, padded, strict=True)
        ]
    )


def keep_rows(cache: DynamicCache, indices: Tensor) -> None:
    """Keep some rows of the batch, in this order, in every layer."""
    layers: Any = cache.layers
    for layer in layers:
        layer.batch_select_indices(indices)


def shortest_window(network: Any) -> int | None:
    """The smallest number of tokens that a layer attends to; None if all attend to all."""
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=network.config).layers]
    return min((window for window in windows if window is not None), default=None)


def cache_bytes_per_token(network: Any, dtype: torch.dtype) -> int:
    """How many bytes of keys and values a token takes; an upper bound for layers that share them."""
    config: Any = network.config.get_text_config(decoder=True)
    heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    width = getattr(config, "hidden_size", 1)
    size: Any = getattr(config, "head_dim", None) or width // max(
        1, getattr(config, "num_attention_heads", 1)
    )
    layers = getattr(config, "num_hidden_layers", 1)
    return 2 * int(layers) * int(_largest(heads)) * int(_largest(size)) * dtype.itemsize


def _largest(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else max(value)
