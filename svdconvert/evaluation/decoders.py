"""Greedy decoding with transformers' networks and with our RWKV-6.

B: rows of the batch, T: tokens, V: vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.evaluation.decoder import Decoder, Tokens
from svdconvert.models.rwkv6 import Memory, Rwkv6

_READ_TOKENS = 512
"""Prompts are read so many tokens at a time: more are not faster, and need more padding."""


def open_decoder(network: nn.Module, beginning: Tokens, longest: int) -> Decoder:
    """The decoder for a network, for prompts that begin with `beginning`.

    `longest` is the largest number of tokens of a prompt and its answer.
    """
    if isinstance(network, Rwkv6):
        return RecurrentDecoder(network, beginning)
    from svdconvert.evaluation.growing_cache import is_plain, shortest_window

    if not is_plain(network):
        return UnsharedDecoder(network)
    window = shortest_window(network)
    # Padding stands between the shared beginning and the rest, and would count in a sliding window.
    shares = window is None or longest <= window
    return CachedDecoder(network, beginning if shares else ())


class CachedDecoder:
    """A network of transformers with a cache of keys and values; rows are padded on the left."""

    def __init__(self, network: Any, beginning: Tokens) -> None:
        from svdconvert.evaluation.growing_cache import new_cache

        self._network = network
        self._shared = len(beginning)
        self._options = _last_logits_only(network)
        self._beginning = new_cache(network)
        if beginning:
            ids = torch.tensor([list(beginning)], device=self._network.device)
            mask = torch.ones_like(ids)
            positions = torch.arange(len(beginning), device=ids.device)[None]
            self._forward(ids, mask, positions, self._beginning)

    def _forward(self, ids_BT: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        logits: Tensor = self._network(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._options,
        ).logits
        return logits[:, -1].float()

    def start(self, rows: Sequence[Tokens]) -> Tensor:
        """The logits (B, V) after the prompts."""
        from svdconvert.evaluation.growing_cache import joined

        rest = [list(row[self._shared :]) for row in rows]
        width = max(map(len, rest))
        parts = [self._read(some) for some in _portions(rest)]
        device = self._network.device
        lengths_B = torch.tensor([len(row) for row in rest], device=device)
        columns = torch.arange(width, device=device)
        own_mask = (columns >= width - lengths_B[:, None]).long()
        shared_mask = own_mask.new_ones(len(rows), self._shared)
        self._mask = torch.cat([shared_mask, own_mask], 1)
        self._next_B = self._shared + lengths_B
        self._cache = joined([cache for _, cache in parts], self._network, self._shared)
        return torch.cat([logits for logits, _ in parts])

    def _read(self, rest: Sequence[Tokens]) -> tuple[Tensor, Any]:
        """The logits after a few prompts, without their shared beginning, and their cache.

        All prompts of a batch together would be padded to the longest of them.
        """
        from svdconvert.evaluation.growing_cache import repeated

        width = max(map(len, rest))
        device = self._network.device
        pads_B = torch.tensor([width - len(row) for row in rest], device=device)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rest], device=device)
        columns = torch.arange(width, device=device)
        own_mask = (columns >= pads_B[:, None]).long()
        shared_mask = own_mask.new_ones(len(rest), self._shared)
        positions = (self._shared + columns - pads_B[:, None]).clamp(min=0)
        cache = repeated(self._beginning, self._network, len(rest))
        return self._forward(ids, torch.cat([shared_mask, own_mask], 1), positions, cache), cache

    def step(self, tokens_B: Tensor) -> Tensor:
        """The logits (B, V) after one more token of each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens_B), 1)], 1)
        logits = self._forward(tokens_B[:, None], self._mask, self._next_B[:, None], self._cache)
        self._next_B = self._next_B + 1
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        from svdconvert.evaluation.growing_cache import keep_rows

        indices = torch.tensor(list(rows), device=self._network.device)
        keep_rows(self._cache, indices)
        self._mask = self._mask[indices]
        self._next_B = self._next_B[indices]


def _portions(prompts: Sequence[Tokens]) -> list[Sequence[Tokens]]:
    """The prompts in their order, in portions of at most _READ_TOKENS with their padding."""
    found: list[list[Tokens]] = []
    width = 0
    for prompt in prompts:
        width = max(width, len(prompt))
        if not found or width * (len(found[-1]) + 1) > _READ_TOKENS:
            found.append([])
            width = len(prompt)
        found[-1].append(prompt)
    return list(found)


def _last_logits_only(network: nn.Module) -> dict[str, Any]:
    """The argument with which the logits are computed for the last token alone, if there is one."""
    known = inspect.signature(network.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


class UnsharedDecoder:
    """A network of transformers whose cache is no keys and values alone, such as a state-space model's.

    Padding would run through its state, so every row has a cache of its own, which starts with its prompt.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network: Any = network
        self._options = _last_logits_only(network) | {"use_cache": True}
        known = inspect.signature(network.forward).parameters
        self._cache = "cache_params" if "cache_params" in known else "past_key_values"
        self._caches: list[Any] = []
        self._lengths: list[int] = []

    def _forward(self, tokens: Tokens, number: int) -> Tensor:
        ids = torch.tensor([list(tokens)], device=self._network.device)
        self._lengths[number] += len(tokens)
        mask = ids.new_ones(1, self._lengths[number])
        given = {self._cache: self._caches[number]}
        output = self._network(input_ids=ids, attention_mask=mask, **given, **self._options)
        self._caches[number] = getattr(output, self._cache)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def start(self, rows: Sequence[Tokens]) -> Tensor:
        """The logits (B, V) after the prompts."""
        self._caches = [None] * len(rows)
        self._lengths = [0] * len(rows)
        return torch.cat([self._forward(row, number) for number, row in enumerate(rows)])

    def step(self, tokens_B: Tensor) -> Tensor:
        """The logits (B, V) after one more token of each row."""
        return torch.cat([self._forward([token], number) for number, token in enumerate(tokens_B.tolist())])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self._caches = [self._caches[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]


class RecurrentDecoder:
    """RWKV-6: a row's past is a state of constant size, through which no padding may run."""

    def __init__(self, network: Rwkv6, beginning: Tokens) -> None:
        self._network = network
        self._shared = len(beginning)
        self._beginning = network.first_state(1)
        self._state: list[Memory] = []
        if beginning:
            self._forward([beginning], self._beginning)
            self._beginning = self._state

    def _forward(self, rows: Sequence[Tokens], state: list[Memory]) -> Tensor:
        ids = torch.tensor([list(row) for row in rows], device=self._network.device)
        output = self._network(ids, state=state, logits_to_keep=1)
        self._state = output.state
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def start(self, rows: Sequence[Tokens]) -> Tensor:
        """The logits (B, V) after the prompts: all rows up to the end of the shortest, then the others."""
        rest = [row[self._shared :] for row in rows]
        active = list(range(len(rest)))
        state = _repeated(self._beginning, len(rest))
        logits: dict[int, Tensor] = {}
        states: dict[int, list[Memory]] = {}
        done = 0
        for end in sorted({len(row) for row in rest}):
            last = self._forward([rest[row][done:end] for row in active], state)
            for number, row in enumerate(active):
                logits[row] = last[number]
                states[row] = _selected(self._state, [number])
            longer = [number for number, row in enumerate(active) if len(rest[row]) > end]
            state = _selected(self._state, longer)
            active = [active[number] for number in longer]
            done = end
        self._state = _joined([states[row] for row in range(len(rest))])
        return torch.stack([logits[row] for row in range(len(rest))])

    def step(self, tokens_B: Tensor) -> Tensor:
        """The logits (B, V) after one more token of each row."""
        return self._forward(tokens_B[:, None].tolist(), self._state)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self._state = _selected(self._state, rows)


def _repeated(state: list[Memory], count: int) -> list[Memory]:
    return [tuple(part.expand(count, *part.shape[1:]) for part in memory) for memory in state]  # type: ignore[misc]


def _selected(state: list[Memory], rows: Sequence[int]) -> list[Memory]:
    return [tuple(part[list(rows)] for part in memory) for memory in state]  # type: ignore[misc]


def _joined(states: Sequence[list[Memory]]) -> list[Memory]:
    """The states of several rows, layer by layer, as those of one batch."""
    return [
        tuple(torch.cat(parts) for parts in zip(*memories, strict=True))  # type: ignore[misc]
        for memories in zip(*states, strict=True)
    ]
