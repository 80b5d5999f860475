"""Where a matrix of the files is in the network, if it is not simply the weight of a module.

At run time all experts of a layer are one parameter (experts, out, in), which may combine two projections:
rows of a gate, then rows of an up projection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import Field

# Bounds for what a manifest says.
_Expert = Annotated[int, Field(ge=0, lt=1 << 16)]
_Row = Annotated[int, Field(ge=0, lt=1 << 32)]
_Step = Annotated[int, Field(ge=1, lt=1 << 8)]


class Rows(NamedTuple):
    """Some rows of a matrix: `size` of them from `first` on, every `step`-th one."""

    first: _Row
    size: _Row
    step: _Step = 1

    @property
    def slice(self) -> slice:
        """The rows as an index."""
        return slice(self.first, self.first + self.size * self.step, self.step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which part of which parameter of the network a matrix of the files is."""

    parameter: str
    """The path of the parameter at run time, such as model.layers.0.mlp.experts.gate_up_proj."""
    expert: _Expert | None = None
    """Its index on the first axis of the parameter; None if the parameter is a single matrix."""
    rows: Rows | None = None
    """Its rows (out features) in that matrix; None if it is all of it."""
    transposed: bool = False
    """True if the files have it as (in, out)."""
    projections: Sequence[str] = ()
    """The projections that it combines, by their names in adapters of single experts; empty if it is one."""
    interleaved: bool = False
    """True if the rows of the projections alternate; otherwise they follow one another."""

    @property
    def module(self) -> str:
        """The path at run time of the module whose parameter it is."""
        return self.parameter.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The name of the parameter within its module, such as gate_up_proj."""
        return self.parameter.rpartition(".")[2]

    def rows_of(self, projection: int, count: int) -> Rows:
        """The rows of one of the combined projections, by number, in a matrix with `count` rows."""
        parts = len(self.projections)
        if self.interleaved:
            return Rows(projection, count // parts, parts)
        return Rows(projection * (count // parts), count // parts)
