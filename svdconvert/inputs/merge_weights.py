"""The weights that an adapter is merged into: the base, else its residual."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.init_evidence import refuse_hidden_init
from svdconvert.inputs.model import OpenModel, find_model, open_model
from svdconvert.inputs.recover_init import lost_init, recover_init
from svdconvert.inputs.sources import Sources
from svdconvert.inputs.unused_sources import check_unused
from svdconvert.manifest.results import Side
from svdconvert.manifest.schema import has_manifest


@dataclass(frozen=True)
class MergeWeights:
    """The open weights, and the delta with the initial state that merging into them needs."""

    side: Side
    model: OpenModel
    delta: AdapterDelta

    @property
    def expected(self) -> Mapping[str, str]:
        """The checksums that the weights must have, by tensor; only of tensors that the manifest lists."""
        manifest = self.delta.manifest
        if manifest is None:
            return {}
        if self.side == "base":
            return manifest.base.fingerprint.tensors if manifest.base else {}
        residual = self.delta.residual
        if self.delta.is_lost and residual is not None and not has_manifest(residual.path):
            return {}  # a plain residual that svdconvert did not write
        if manifest.kind == "decomposed":
            return manifest.checksums
        return manifest.residual.fingerprint.tensors if manifest.residual else {}


def choose_weights(
    delta: AdapterDelta, side: Literal["auto", "base", "residual"], sources: Sources
) -> MergeWeights:
    """With `side` "auto" the base if it is given or found, else the residual; otherwise the given side.

    A lost initial adapter is recovered if merging into the base needs it. Raises ArtifactError if neither is
    found, CheckpointError if one is damaged or the Hub does not answer.
    """
    if side == "auto" and not sources.base and _needs_no_init(delta):
        side = "residual"
    if side != "residual":
        base = find_model(
            delta.manifest.base if delta.manifest else None,
            sources.base,
            stream=sources.stream,
            trust_remote_code=sources.trust_remote_code,
        )
        if base is not None:
            check_unused(delta, sources, base_used=True)
            refuse_hidden_init(delta, base)
            return MergeWeights("base", base, recover_init(delta, sources, base))
        if side == "base" or not delta.has_residual:
            raise _no_base(delta)
    if not delta.has_residual:
        raise ArtifactError(
            f"{delta.directory} has no residual base: its method leaves the base unchanged; use --from base"
        )
    check_unused(delta, sources, base_used=False, residual_used=True)
    return MergeWeights("residual", _open_residual(delta, sources), delta)


def _needs_no_init(delta: AdapterDelta) -> bool:
    """True if the initial adapter is lost and a residual is known, into which one can merge without it."""
    known = delta.manifest.residual if delta.manifest else None
    return delta.is_lost and (delta.residual is not None or known is not None)


def _no_base(delta: AdapterDelta) -> ArtifactError:
    if delta.is_lost:
        return lost_init(delta)
    origin = delta.manifest.base if delta.manifest else None
    location = origin.location if origin else "unknown"
    return ArtifactError(
        f"the base of {delta.directory} is not found ({location}); give its location with --base"
    )


def _open_residual(delta: AdapterDelta, sources: Sources) -> OpenModel:
    settings = {"stream": sources.stream, "trust_remote_code": sources.trust_remote_code}
    if delta.residual is not None:
        return open_model(delta.residual.name, **settings)
    assert delta.manifest is not None
    origin = delta.manifest.residual
    found = find_model(origin, sources.residual, **settings)
    if found is None:
        location = origin.location if origin else "none was written"
        raise ArtifactError(
            f"neither the base nor the residual of {delta.directory} is found ({location}); "
            "give the location of one with --base or --residual"
        )
    return found
