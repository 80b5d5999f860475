"""A low-rank matrix as its factors.  O: out features, I: in features, R: rank.

    update_OI = scale * left_OR @ core @ right_RI

`core` is absent (PiSSA, MiLoRA, OLoRA, LoRA: left is B, right is A), a vector of R entries (SORSA: the
diagonal S) or an R x R matrix (LoRA-XS). Every method ends in `Factors`, so the arithmetic of merging,
conversion and training does not depend on the method.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SIDES = ("lora_A", "lora_B")
"""The factors that every adapter has."""
FACTOR_AXES = {"lora_A": "RI", "lora_B": "OR", "lora_S": "R", "lora_R": "RR"}
"""The factors by their names in an adapter's file, and their axes: O, I and R.

A core is recognised by its number of axes. A new kind of core is an entry here, its product in `folded`,
and its product with activations in `svdconvert.training.model.adapted_linear`.
"""
_CORES = {len(axes): name for name, axes in FACTOR_AXES.items() if name not in SIDES}


def factor_shapes(rows: int, columns: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The shape that each factor has, or would have, for a matrix of shape (rows, columns)."""
    sizes = {"O": rows, "I": columns, "R": rank}
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in FACTOR_AXES.items()}


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one low-rank matrix, without its scale."""

    left_OR: Tensor
    right_RI: Tensor
    core: Tensor | None = None
    """(R,) or (R, R)."""

    @property
    def rank(self) -> int:
        """The number of columns of the left factor."""
        return self.left_OR.shape[1]

    def folded(self) -> tuple[Tensor, Tensor]:
        """(B, A) in float32 with the core multiplied into B: what a standard LoRA stores."""
        left = self.left_OR.float()
        right = self.right_RI.float()
        if self.core is None:
            return left, right
        core = self.core.float()
        return (left * core if core.dim() == 1 else left @ core), right

    def dense(self, scale: float) -> Tensor:
        """scale * left @ core @ right in float32, (O, I)."""
        left, right = self.folded()
        product = left @ right
        return product if scale == 1.0 else product.mul_(scale)

    def to(self, dtype: torch.dtype) -> "Factors":
        """The same factors, contiguous, in the dtype in which they are stored."""
        core = None if self.core is None else self.core.to(dtype)
        return Factors(self.left_OR.to(dtype).contiguous(), self.right_RI.to(dtype).contiguous(), core)

    def on(self, device: torch.device) -> "Factors":
        """The same factors on a device."""
        core = None if self.core is None else self.core.to(device)
        return Factors(self.left_OR.to(device), self.right_RI.to(device), core)

    def pieces(self) -> dict[str, Tensor]:
        """The factors by their names in an adapter's file."""
        named = {"lora_A": self.right_RI, "lora_B": self.left_OR}
        if self.core is not None:
            named[_CORES[self.core.dim()]] = self.core
        return named

    @staticmethod
    def of(pieces: Mapping[str, Tensor]) -> "Factors":
        """The inverse of `pieces`."""
        cores = [pieces[name] for name in _CORES.values() if name in pieces]
        return Factors(pieces["lora_B"], pieces["lora_A"], cores[0] if cores else None)
