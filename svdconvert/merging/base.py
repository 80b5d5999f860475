"""What a merge method is: how the changes, the weights or the factors of several models become one.

O: out features, I: in features, R: rank. A method works on one tensor at a time and knows nothing of names or
files. It says which of these it merges:

- `blocks` or `changes`: what the models change in a tensor of their base. Checkpoints give W - W_base.
  Adapters give the same changes in bases of the joint column and row spaces of all of them, a few hundred
  rows and columns. `blocks` needs some rows of every model at a time, `changes` all of them.
- `weights`: the tensors themselves, of checkpoints, in blocks.
- `factors`: the factors (B, A) of the changes of adapters, with the scales in B.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal

import torch
import xxhash
from torch import Tensor

from svdconvert.errors import RecipeError
from svdconvert.plugins import Registry

Product = tuple[Tensor, Tensor]
"""(left_OR, right_RI)."""
Value = float | bool
Input = Literal["adapters", "checkpoints"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number or a truth value that a method takes."""

    name: str
    default: Value
    summary: str
    per_model: bool = False
    """True if every model has its own value; else there is one for each tensor."""
    required: bool = False
    """True if a configuration file must give it, as mergekit demands; the command line uses the default."""
    least: float = -1e9
    most: float = 1e9

    def check(self, value: object, source: str) -> Value:
        """The value. Raises RecipeError if it is of the wrong type or out of range."""
        if isinstance(self.default, bool):
            if not (isinstance(value, bool) or value in (0, 1)):
                raise RecipeError(f"{source}: {self.name} is {value!r}, which must be true or false")
            return bool(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise RecipeError(f"{source}: {self.name} is {value!r}, which must be a number")
        if not self.least <= value <= self.most:
            raise RecipeError(
                f"{source}: {self.name} is {value:g}, which must be from {self.least:g} to {self.most:g}"
            )
        return float(value)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values of a method's parameters for one tensor."""

    shape: tuple[int, ...]
    """The shape of the tensor: (O, I) also if the changes are given in smaller bases."""
    each: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    """Parameter -> one value for each model, in the order of the changes, weights or factors."""
    shared: Mapping[str, Value] = field(default_factory=dict)
    rank: int | None = None
    """The rank that the result is truncated to, for methods on factors that truncate anyway."""
    base: int | None = None
    """The position of the base among the weights."""
    name: str = ""
    seed: int = 0

    def number(self, name: str) -> float:
        """The value of a parameter that all models share."""
        return float(self.shared[name])

    def numbers(self, name: str) -> list[float]:
        """The values of a parameter that every model has."""
        return [float(value) for value in self.each[name]]

    def of(self, models: Sequence[int]) -> "Settings":
        """The settings for some of the models."""
        each = {name: [values[model] for model in models] for name, values in self.each.items()}
        return replace(self, each=each)

    def generator(self, key: object) -> torch.Generator:
        """A fresh generator for one model's random numbers, seeded by (seed, key, tensor)."""
        digest = xxhash.xxh3_64_intdigest(f"{self.seed}:{key}:{self.name}".encode())
        return torch.Generator().manual_seed(digest >> 1)


@dataclass(frozen=True)
class Blocks:
    """One tensor of every model, in blocks of the same whole rows; a row is along the last dimension.

    Each iteration is another pass from the first row to the last. A block is a list with a matrix of every
    model, valid until the next one is requested.
    """

    entries: int
    """Entries of one model's tensor."""
    read: Callable[[], Iterator[list[Tensor]]]

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self.read()

    @staticmethod
    def of_matrices(matrices: Sequence[Tensor]) -> "Blocks":
        """Copies of some matrices as one block."""
        return Blocks(matrices[0].numel(), lambda: iter([[matrix.clone() for matrix in matrices]]))


MergeChanges = Callable[[Sequence[Tensor], Settings], Tensor]
MergeBlocks = Callable[[Blocks, Settings], Iterator[Tensor]]
MergeFactors = Callable[[Sequence[Product], Settings], Product]


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """One method, as data and functions."""

    summary: str
    """One line for `svdconvert list merges`."""
    paper: str
    """The paper or the program that defines it."""
    takes: frozenset[Input]
    parameters: tuple[Parameter, ...] = ()
    blocks: MergeBlocks | None = None
    """The merged change in the same blocks, of float32 or float64 changes, which it may overwrite. What it
    needs of entire tensors it measures in passes of its own before it yields the first block."""
    changes: MergeChanges | None = None
    """The merged change, of entire float32 or float64 changes of one shape, which it may overwrite."""
    weights: MergeBlocks | None = None
    """The merged tensor in the same blocks, of float32 tensors, which it does not change."""
    factors: MergeFactors | None = None
    """(B, A) in float64 of the merged change, of float32 factors. For adapters it goes before `changes`."""
    least: int = 1
    """The smallest number of models, without the base."""
    most: int | None = None
    """The largest number of models, without the base; None if there is none."""
    rank: Callable[[Sequence[int], tuple[int, int]], int] = lambda ranks, shape: min(sum(ranks), *shape)
    """(ranks of the adapters, (O, I)) -> the rank of the result unless the user truncates it."""
    is_dense: bool = False
    """True if the result has the rank of the matrix before it is truncated."""
    base: Literal["needed", "optional", "none"] = "needed"
    """Whether checkpoints need a base. An optional one is merged like all others."""
    draws: bool = False
    """True if it draws random numbers."""

    def merged_change(self, changes: Sequence[Tensor], settings: Settings) -> Tensor:
        """The merged change of small matrices, by `blocks` or `changes`; these may be overwritten."""
        if self.changes is not None:
            return self.changes(changes, settings)
        assert self.blocks is not None
        (merged,) = self.blocks(Blocks.of_matrices(changes), settings)
        return merged

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name; None if there is none."""
        return next((one for one in self.parameters if one.name == name), None)


MERGES: Registry[MergeMethod] = Registry(
    "svdconvert.merging",
    "METHOD",
    MergeMethod,
    shared=("base", "magnitudes", "parameters", "peft_rules", "rank_space", "sparsity", "spectra", "sums"),
)

ADAPTERS: frozenset[Input] = frozenset({"adapters"})
CHECKPOINTS: frozenset[Input] = frozenset({"checkpoints"})
BOTH = ADAPTERS | CHECKPOINTS
