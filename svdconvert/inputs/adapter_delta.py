"""The change made by training: the factors of an adapter before and after it, matrix by matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.adapters.peft_files import Adapter
from svdconvert.errors import ArtifactError
from svdconvert.hub.download import Snapshot
from svdconvert.inputs.recovered_init import RecoveredInit
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.schema import Manifest, training_of
from svdconvert.manifest.training import Training


@dataclass(frozen=True)
class AdapterDelta:
    """An adapter and its initial state.

    The delta of a matrix is scale * B A - scale0 * B0 A0.
    """

    directory: Path
    adapter: Adapter
    """As it is now: trained, or initial in a decomposed directory."""
    initial_adapter: Adapter | None
    """Before training; None if it was zero (a LoRA on the untouched base)."""
    manifest: Manifest | None
    """The manifest of the directory or of its residual; None for an adapter of unknown origin."""
    residual: Snapshot | None = None
    """The residual base that the user or the adapter names. Its weights may not be downloaded yet."""
    is_lost: bool = False
    """True if the adapter did not start at zero and its initial state is not stored."""
    is_assumed_zero: bool = False
    """True if no file records the initial state: it is assumed to be zero until the weights are compared."""
    uses_base: bool = False
    """True if the base's headers gave the shapes of the adapted matrices, which its file does not store."""
    approximation: Callable[[str], tuple[float, float]] | None = None
    """Module -> (||change - factors||_F, ||change||_F), if the factors only approximate the change."""
    recovered: RecoveredInit | None = None
    """The initial state as recovered from the weights."""

    @property
    def modules(self) -> list[str]:
        """The adapted modules, in the order of the adapter's file."""
        return list(self.adapter.modules)

    @property
    def layout_name(self) -> str | None:
        """The layout of its base, if the manifest names it."""
        return self.manifest.layout or None if self.manifest else None

    @property
    def training(self) -> Training | None:
        """The training that the adapter comes from; None if nothing is known of it."""
        return training_of(self.directory, self.manifest)

    @property
    def has_residual(self) -> bool:
        """True if the adapter was trained on a residual base."""
        if self.manifest is None:
            return self.residual is not None
        return self.manifest.kind != "lora" and self.manifest.base_is_residual

    def initial(self, module: str) -> tuple[Factors, float]:
        """(factors before training, their scale)."""
        if self.recovered is not None:
            return self.recovered.factors(module), self.recovered.scales[module]
        assert not self.is_lost, "the initial adapter is needed and was not recovered"
        if self.initial_adapter is not None:
            return self.initial_adapter.factors(module), self.initial_adapter.config.scale(module)
        now = self.adapter.factors(module)
        return Factors(torch.zeros_like(now.left_OR), now.right_RI, now.core), 1.0

    def trained(self, module: str) -> tuple[Factors, float]:
        """(factors after training, their scale). Raises ArtifactError for DoRA: its change is no product."""
        if self.adapter.config.dora:
            raise ArtifactError(
                f"{self.directory} is a DoRA adapter, whose magnitudes no LoRA can express exactly; use merge"
            )
        return self.adapter.factors(module), self.adapter.config.scale(module)

    def parameter(self, name: str) -> Tensor:
        """The trained value of a parameter that was trained in full."""
        return self.adapter.parameter(name)

    def input_paths(self) -> list[Path]:
        """All input directories, including the residual that the adapter depends on."""
        residual = self.manifest.residual if self.manifest else None
        return [
            self.directory,
            *([self.initial_adapter.directory] if self.initial_adapter else []),
            *([Path(residual.location)] if residual and Path(residual.location).exists() else []),
        ]

    def identity(self) -> dict[str, Any]:
        """Describes the adapter: an interrupted run continues only if this is unchanged."""
        start = self.initial_adapter.source.file_versions() if self.initial_adapter else {}
        if self.recovered:
            start = self.recovered.file_versions()
        return {
            "location": str(self.directory.absolute()),
            "files": dict(self.adapter.source.file_versions()),
            "start": dict(start),
        }
