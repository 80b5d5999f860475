"""How a matrix of the network is stored in the files, if it is not simply a tensor with the same shape.

A tensor of the files is seen as a matrix: all its dimensions but the last are flattened into rows. An expert
of a stacked tensor (experts, out, in), a part of a fused projection and a whole matrix are then all the same
thing: consecutive rows, which are consecutive bytes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Consecutive rows of a tensor in the files, whose dimensions but the last are flattened."""

    tensor: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """The rows that make up a matrix of the network, in their order, and their arrangement."""

    rows: tuple[StoredRows, ...]
    """Put below one another; all have the same number of columns."""
    transposed: bool = False
    """True if they are (in, out), as in a Conv1D or in experts that are multiplied from the left."""
    interleaved: bool = False
    """True if rows 0, 2, 4, ... of what is stored are the first half of the network's rows."""
