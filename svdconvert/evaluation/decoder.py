"""What greedy decoding needs of a network.  B: rows of the batch, V: vocabulary."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

Tokens = Sequence[int]


class Decoder(Protocol):
    """A network that continues several rows at a time, without computing a token's part twice.

    It knows the beginning that all prompts share, and has computed it once.
    """

    def start(self, rows: Sequence[Tokens]) -> Tensor:
        """The logits (B, V) after the prompts `rows`, which begin with the shared beginning."""

    def step(self, tokens_B: Tensor) -> Tensor:
        """The logits (B, V) after one more token of each row."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch only, in this order."""


def shared_beginning(rows: Sequence[Tokens]) -> list[int]:
    """The tokens that all rows begin with; every row has at least one more."""
    if not rows:
        return []
    ordered = [list(row) for row in rows]
    first = min(ordered)
    last = max(ordered)  # no two rows differ earlier than these
    shortest = min(map(len, rows))
    count = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), shortest)
    return list(first[: min(count, shortest - 1)])
