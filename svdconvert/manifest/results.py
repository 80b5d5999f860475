"""What a command found or measured: one result class for each kind of directory that has one.

Options say what was asked for (`Manifest.options`); these classes say what came out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Side = Literal["base", "residual"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptUpdate:
    """How much of the intended update the rounded weights hold, for one matrix.

    With u the intended and v the realised change of a matrix: size = ||u||_F, cosine =
    <u, v> / (||u|| ||v||), kept = <u, v> / ||u||^2, which is 1 if rounding is unbiased.
    """

    size: float
    cosine: float
    kept: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The same over all matrices together, and by tensor."""

    cosine: float
    kept: float
    matrices: Mapping[str, KeptUpdate]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveredFactors:
    """How a missing initial adapter was computed again from the weights."""

    by: str
    """"difference" (base minus residual), or the method that repeats it from the base."""
    error: float | None = None
    """||W - W_res - s0 B0 A0|| / ||W - W_res|| over all matrices; None if the method repeats it."""
    of_base: float | None = None
    """The same remainder relative to ||W||."""
    modules: Mapping[str, float] = field(default_factory=dict)
    """`error` by module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TruncatedModule:
    """One matrix of a truncated LoRA."""

    rank: int
    error: float
    """||change - kept||_F / ||change||_F."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TruncatedLora:
    """What the truncation of a LoRA loses."""

    error: float
    """||change - kept||_F / ||change||_F over all matrices."""
    modules: Mapping[str, TruncatedModule]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Of a trained adapter."""

    head: Mapping[str, Any] | None = None
    """The entries of config.json that describe a head trained with the adapter; None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """Of a merged checkpoint."""

    side: Side = "base"
    """The weights that were merged into."""
    update: Update | None = None
    """None if no matrix was changed, or if the intended update is not known."""
    recovered: RecoveredFactors | None = None
    head: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraResult:
    """Of a LoRA for the untouched base."""

    rank: int = 0
    """The rank in its configuration: the largest of its matrices."""
    truncation: TruncatedLora | None = None
    """None if the LoRA is exact."""
    recovered: RecoveredFactors | None = None
    head: Mapping[str, Any] | None = None


Result = TrainResult | MergeResult | LoraResult

RESULT_OF_KIND: Mapping[str, type[Result]] = {
    "trained": TrainResult,
    "merged": MergeResult,
    "lora": LoraResult,
}
"""Kind -> the class of its result. Other kinds have none: their matrices say all."""
