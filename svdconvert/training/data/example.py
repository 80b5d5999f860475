"""One row as a model reads it."""

from dataclasses import dataclass

from torch import Tensor

IGNORED = -100
"""The label of a token that is not in the loss."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row as tokens, or several that were packed into one."""

    input_ids: Tensor
    """int32, T entries."""
    labels: Tensor
    """int32, T entries, each the token of its own position or IGNORED; or one label of the whole row, ()."""
    length: int = 0
    """Tokens of the row before it was cut."""
    starts: tuple[int, ...] = (0,)
    """Where the rows begin that were packed into this one."""
    types: Tensor | None = None
    """int32, T entries: which of two texts a token is of, where the model asks for that."""

    @property
    def loss_tokens(self) -> int:
        """What the row counts in a mean: tokens in the loss, of which the first of a row is never one."""
        return int((self.labels[1:] != IGNORED).sum()) if self.labels.dim() else 1
