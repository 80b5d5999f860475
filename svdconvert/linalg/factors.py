"""A low-rank matrix in pieces.  O: out features, I: in features, R: rank.

Every method ends in `Factors`, so merging, conversion and training contain no method's name:

    update_OI = scale * left_OR @ core @ right_RI

`core` is absent (PiSSA, MiLoRA, OLoRA, LoRA: left B, right A), a vector of R entries (SORSA: the
diagonal S) or an R x R matrix (LoRA-XS).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """The pieces of one low-rank matrix, without its scale."""

    left_OR: Tensor
    right_RI: Tensor
    core: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of columns of the left piece."""
        return self.left_OR.shape[1]

    def folded(self) -> tuple[Tensor, Tensor]:
        """(B, A) in float32 with the core folded into B: what a standard LoRA stores."""
        left, right = self.left_OR.float(), self.right_RI.float()
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
        """The same pieces in the dtype in which they are stored."""
        core = None if self.core is None else self.core.to(dtype)
        return Factors(self.left_OR.to(dtype).contiguous(), self.right_RI.to(dtype).contiguous(), core)

    def on(self, device: torch.device) -> "Factors":
        """The same pieces on a device."""
        core = None if self.core is None else self.core.to(device)
        return Factors(self.left_OR.to(device), self.right_RI.to(device), core)

    def pieces(self) -> dict[str, Tensor]:
        """The stored pieces by their names in an adapter file."""
        named = {"lora_A": self.right_RI, "lora_B": self.left_OR}
        if self.core is not None:
            named["lora_S" if self.core.dim() == 1 else "lora_R"] = self.core
        return named

    @staticmethod
    def of(pieces: Mapping[str, Tensor]) -> "Factors":
        """The inverse of `pieces`."""
        core = pieces.get("lora_S", pieces.get("lora_R"))
        return Factors(pieces["lora_B"], pieces["lora_A"], core)
