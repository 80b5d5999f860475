"""Greedy answers to many prompts: batches that are fixed in advance, and the end of every answer.

B: rows of the batch, V: vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from svdconvert.evaluation.decoder import Decoder, Tokens, shared_beginning
from svdconvert.evaluation.decoders import open_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

End = Literal["end", "stop", "limit"]
"""Why an answer ended: the model ended it, a stop string came, or the limit of tokens or of the context."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to one prompt."""

    text: str
    """Up to, and without, the first stop string."""
    tokens: int
    """Number of tokens that were generated, with the one that ended the answer."""
    end: End
    lengths: dict[int, int] = field(default_factory=dict)
    """Limit of tokens -> length of the text that so many tokens make, for smaller limits that it exceeds."""


@dataclass(frozen=True, kw_only=True)
class Endings:
    """What ends an answer."""

    max_new_tokens: int
    stops: tuple[str, ...]
    ids: frozenset[int]
    """Tokens with which the model ends a text."""
    context: int | None
    """The most tokens of a prompt and its answer that the network takes; None if there is no limit."""
    smaller_limits: tuple[int, ...] = ()
    """The answers must tell how long they would be with these limits."""

    def room(self, prompt: Tokens) -> int:
        """How many tokens an answer to this prompt may have; 0 if the prompt does not fit."""
        if self.context is None:
            return self.max_new_tokens
        return max(0, min(self.max_new_tokens, self.context - len(prompt)))


def plan_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of rows in batches of `size`: the longest rows first, so that those of a batch are alike."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[first : first + size] for first in range(0, len(order), size)]


class Writer:
    """A network that answers prompts in batches."""

    def __init__(
        self,
        network: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence[Tokens],
        endings: Endings,
    ) -> None:
        """`prompts` are all that will be answered, in this run or another: their common beginning is computed
        once."""
        self._network = network
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._endings = endings
        self._fitting = [row for row, prompt in enumerate(prompts) if endings.room(prompt) > 0]
        self._decoder: Decoder | None = None

    def _open(self) -> Decoder:
        """The decoder, made when the first answer is needed."""
        if self._decoder is None:
            fitting = [self._prompts[row] for row in self._fitting]
            longest = max(len(prompt) + self._endings.room(prompt) for prompt in fitting)
            self._decoder = open_decoder(self._network, shared_beginning(fitting), longest)
        return self._decoder

    @torch.no_grad()
    def answers(self, rows: Sequence[int]) -> list[Answer]:
        """The answers to the prompts with these numbers, which form one batch."""
        found: dict[int, Answer] = {row: Answer("", 0, "limit") for row in rows}
        fitting = [row for row in rows if self._endings.room(self._prompts[row]) > 0]
        if fitting:
            writing = [_Writing(row, self._endings.room(self._prompts[row])) for row in fitting]
            self._write(writing)
            found |= {one.row: self._answer(one) for one in writing}
        return [found[row] for row in rows]

    def _write(self, writing: list["_Writing"]) -> None:
        """Greedy decoding until every answer has ended."""
        decoder = self._open()
        logits_BV = decoder.start([self._prompts[one.row] for one in writing])
        active = writing
        while True:
            tokens_B = logits_BV.argmax(dim=1)
            for one, token in zip(active, tokens_B.tolist(), strict=True):
                self._append(one, token)
            going = _close_ranks([one.end is None for one in active])
            if not going:
                return
            if len(going) < len(active):
                decoder.keep(going)
                active = [active[number] for number in going]
                tokens_B = tokens_B[torch.tensor(going, device=tokens_B.device)]
            logits_BV = decoder.step(tokens_B)

    def _append(self, one: "_Writing", token: int) -> None:
        """Add a token to an answer, and end it if that is due."""
        one.count += 1
        if token in self._endings.ids:
            one.end = "end"
            return
        one.ids.append(token)
        if self._endings.stops and self._has_stop(one.ids):
            one.end = "stop"
        elif one.count >= one.limit:
            one.end = "limit"

    def _has_stop(self, ids: list[int]) -> bool:
        """True if the last tokens hold a stop string: each token is a byte at least."""
        longest = max(len(stop.encode()) for stop in self._endings.stops)
        text = self._text(ids[-(longest + 8) :])
        return any(stop in text for stop in self._endings.stops)

    def _text(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids)

    def _answer(self, one: "_Writing") -> Answer:
        text = cut_at_stop(self._text(one.ids), self._endings.stops)
        limits = [limit for limit in self._endings.smaller_limits if limit < len(one.ids)]
        lengths = {limit: min(len(text), len(self._text(one.ids[:limit]))) for limit in limits}
        return Answer(text, one.count, one.end or "limit", lengths)


@dataclass
class _Writing:
    """An answer that is being written."""

    row: int
    limit: int
    ids: list[int] = field(default_factory=list)
    """Its tokens, without the one that ends it."""
    count: int = 0
    end: End | None = None


def _close_ranks(going: Sequence[bool]) -> list[int]:
    """The numbers of the rows that go on, in an order in which as few as possible change their place."""
    count = sum(going)
    later = (number for number in range(count, len(going)) if going[number])
    return [number if going[number] else next(later) for number in range(count)]


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of tokens, without special ones and without changes to its spaces."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cut_at_stop(text: str, stops: Collection[str]) -> str:
    """The text before the first stop string."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], bos: int) -> list[list[int]]:
    """Prompts as tokens, as the tokenizer begins a text; `bos` stands for one that has no token.

    An end-of-text token that the tokenizer appends is left out, because the answer follows.
    """
    encode: Any = tokenizer
    found = []
    for text in texts:
        ids: list[int] = list(encode(text, verbose=False)["input_ids"])
        while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        found.append(ids or [bos])
    return found


def ending_ids(network: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation_config.json."""
    config = getattr(network, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(one for one in [*ids, tokenizer.eos_token_id] if isinstance(one, int))


def context_length(network: nn.Module) -> int | None:
    """The most tokens that a network takes; None if its configuration has no limit."""
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if config is not None else None
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
