"""What a command determined or measured: one class for each kind of directory that has such a result.

`Manifest.options` has what the user requested; these classes have what resulted from it.
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
    """How much of the update the rounded weights hold, over all matrices together and by tensor."""

    cosine: float
    kept: float
    matrices: Mapping[str, KeptUpdate]

    @property
    def expected_gain(self) -> float:
        """The share of the fall in loss that the kept part of the update should bring; 1 for all of it.

        Along the update the loss is taken for a parabola with its lowest point at the end of training, so a
        share k of the update brings 1 - (1 - k)^2. docs/precision.md compares that with measurements.
        """
        missing = min(max(1.0 - self.kept, 0.0), 1.0)
        return 1.0 - missing**2


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveredFactors:
    """How a missing initial adapter was recovered from the weights."""

    by: str
    """"difference" (base minus residual), or the method by which it was recomputed from the base."""
    error: float | None = None
    """||W - W_res - s0 B0 A0|| / ||W - W_res|| over all matrices; None if it was recomputed."""
    of_base: float | None = None
    """||W - W_res - s0 B0 A0|| / ||W|| over all matrices."""
    modules: Mapping[str, float] = field(default_factory=dict)
    """`error` by module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TruncatedModule:
    """Rank and error of one matrix of a truncated LoRA."""

    rank: int
    error: float
    """||change - kept||_F / ||change||_F."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TruncatedLora:
    """The error of a LoRA's truncation."""

    error: float
    """||change - kept||_F / ||change||_F over all matrices."""
    modules: Mapping[str, TruncatedModule]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Result of a trained adapter."""

    head: Mapping[str, Any] | None = None
    """The entries of config.json that describe a head trained with the adapter; None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """Result of a merged checkpoint."""

    side: Side = "base"
    """The weights that the adapter was merged into."""
    update: Update | None = None
    """None if no matrix was changed, or if the intended update is not known."""
    recovered: RecoveredFactors | None = None
    head: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractedMatrix:
    """Rank and measured error of one matrix of an extracted LoRA."""

    rank: int
    norm: float
    """||change||_F, of the change TUNED - BASE in float32."""
    error: float
    """||change - BA||_F / ||change||_F."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """What an extracted LoRA holds of the change from one checkpoint to another."""

    tuned: str
    """Location of the tuned checkpoint, with its commit if it is on the Hub."""
    error: float
    """||change - held||_F / ||change||_F over all tensors; what is kept in full has no error."""
    norm: float
    """||change||_F over all tensors."""
    kept: tuple[str, ...] = ()
    """Tensors that changed and are stored in full."""
    omitted: Mapping[str, float] = field(default_factory=dict)
    """||change||_F of the tensors that changed and are not in the LoRA."""
    modules: Mapping[str, ExtractedMatrix] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraResult:
    """Result of a LoRA for the untouched base."""

    rank: int = 0
    """The rank in its configuration: the largest rank of a matrix."""
    truncation: TruncatedLora | None = None
    """None if no rank was left out."""
    rounding: float = 0.0
    """||BA - stored||_F / ||BA||_F over all matrices, for factors BA that were rounded to half precision."""
    norm: float | None = None
    """||BA||_F over all matrices; 0 if training changed nothing. None in a manifest of version 0.1."""
    missed: float | None = None
    """For an adapter of a 4-bit residual Q: the mean of ||W - (Q + s0 B0 A0)||_F / ||W||_F over the matrices,
    which the LoRA leaves out on the untouched base; None for other adapters."""
    recovered: RecoveredFactors | None = None
    extracted: Extraction | None = None
    """None unless it was extracted from two checkpoints."""
    head: Mapping[str, Any] | None = None


Result = TrainResult | MergeResult | LoraResult

RESULT_OF_KIND: Mapping[str, type[Result]] = {
    "trained": TrainResult,
    "merged": MergeResult,
    "lora": LoraResult,
}
"""Kind -> the class of its result. Other kinds have no result in addition to `Manifest.matrices`."""
