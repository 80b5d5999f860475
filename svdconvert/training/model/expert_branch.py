"""The factors of the experts of one parameter, as a part of a network.

E: experts, R: rank, O: out features, I: in features, N: tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from svdconvert.linalg.factors import Factors
from svdconvert.manifest.place import Rows
from svdconvert.training.model.adapted_linear import correct_gradient


@dataclass(frozen=True, kw_only=True)
class Training:
    """How factors are trained."""

    trains: frozenset[str]
    """Which factors, of "lora_A", "lora_B", "lora_S" and "lora_R"."""
    dropout: float = 0.0
    corrected: bool = False
    """As in AdaptedLinear."""


class ExpertBranch(nn.Module):
    """scale * B core A for several experts.

    lora_A is (E, R, I), lora_B (E, O, R), and a core lora_S (E, R) or lora_R (E, R, R), all in float32.
    Trained factors are parameters, the others buffers.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        factors: Sequence[Factors],
        scale: float,
        rows: Rows | None,
        training: Training,
        device: torch.device,
    ) -> None:
        """`names` has the name in the adapter of each expert, by number; `factors` are in the same order."""
        super().__init__()
        self.names = tuple(names.values())
        self.position = {number: position for position, number in enumerate(names)}
        """Expert -> its index in the factors."""
        self.scale = scale
        self.rows = rows
        """The rows of the experts' matrices that are changed; None for all."""
        self.dropout = nn.Dropout(training.dropout)
        self._factor_names = tuple(factors[0].pieces())
        for name in self._factor_names:
            stacked = torch.stack([each.pieces()[name].detach() for each in factors])
            own = stacked.to(device, torch.float32)
            if name in training.trains:
                self.register_parameter(name, nn.Parameter(own))
            else:
                self.register_buffer(name, own)
        if training.corrected:
            correct_gradient(self.factor("lora_B"), self.factor("lora_A"), scale)

    @property
    def has_singular_values(self) -> bool:
        """True if the core is a vector of singular values (SORSA)."""
        return "lora_S" in self._factor_names

    def factor(self, name: str) -> Tensor:
        """The live tensor of a factor of all experts."""
        tensor = getattr(self, name)
        assert isinstance(tensor, Tensor)
        return tensor

    def live_factors(self) -> dict[str, Factors]:
        """Name in the adapter -> factors without a copy: they change as training goes on."""
        return {
            name: Factors.of({piece: self.factor(piece).detach()[position] for piece in self._factor_names})
            for position, name in enumerate(self.names)
        }

    def by_expert(self) -> "Applied":
        """The factors of this step, taken apart once: indexing a parameter again and again is slow."""
        return Applied(self, {name: self.factor(name).unbind(0) for name in self._factor_names})

    def delta(self) -> Tensor:
        """The products scale * B core A of the experts that it has, (E, O, I) in float32."""
        right = self.factor("lora_A")
        if self.has_singular_values:
            right = self.factor("lora_S")[..., None] * right
        elif "lora_R" in self._factor_names:
            right = self.factor("lora_R") @ right
        return self.scale * (self.factor("lora_B") @ right)


@dataclass(frozen=True, slots=True)
class Applied:
    """The factors of a branch, expert by expert."""

    branch: ExpertBranch
    factors: Mapping[str, Sequence[Tensor]]

    def add(self, out_NO: Tensor, x_NI: Tensor, expert: int) -> Tensor:
        """out + scale * B core A x for the tokens of one expert, in the dtype of `out`."""
        position = self.branch.position.get(expert)
        if position is None:
            return out_NO
        wide = x_NI if torch.is_autocast_enabled(x_NI.device.type) else x_NI.float()
        low = linear(self.branch.dropout(wide), self.factors["lora_A"][position])
        if self.branch.has_singular_values:
            low = (low * self.factors["lora_S"][position]).to(low.dtype)
        elif "lora_R" in self.factors:
            low = linear(low, self.factors["lora_R"][position])
        change = self.branch.scale * linear(low, self.factors["lora_B"][position])
        if self.branch.rows is None:
            return (out_NO + change).to(out_NO.dtype)
        changed = out_NO.clone()
        changed[:, self.branch.rows.slice] += change.to(out_NO.dtype)
        return changed
