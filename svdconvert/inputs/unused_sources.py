"""Locations that the user gave but that are not needed: they are compared with the manifest, or refused."""

from collections.abc import Sequence

from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import find_model
from svdconvert.inputs.sources import NO_INIT, Sources
from svdconvert.manifest.schema import Origin, has_manifest


def check_unused(
    delta: AdapterDelta, sources: Sources, *, base_used: bool, residual_used: bool = False
) -> None:
    """Raise ArtifactError for a location that changes nothing and cannot be confirmed to be the right model.

    A wrong model is an error even if the command does not read its weights.
    """
    manifest = delta.manifest
    # An adapter without a manifest uses the manifest and the initial adapter of its residual's directory.
    residual_used = residual_used or delta.is_lost or not has_manifest(delta.directory)
    if sources.base and not (base_used or delta.uses_base):
        _confirm("--base", sources.base, manifest.base if manifest else None, delta)
    if sources.residual and not residual_used:
        _confirm("--residual", sources.residual, manifest.residual if manifest else None, delta)
    if sources.init and sources.init != NO_INIT and delta.initial_adapter is None:
        raise ArtifactError(
            f"--init {sources.init} changes nothing for {delta.directory}, whose initial adapter was zero; "
            "leave it out"
        )
    refuse_idle_zero([delta], sources)


def refuse_idle_zero(deltas: Sequence[AdapterDelta], sources: Sources) -> None:
    """Raise ArtifactError for `--init none` if the start of every adapter is recorded."""
    if sources.init == NO_INIT and all(
        delta.initial_adapter is not None or has_manifest(delta.directory) for delta in deltas
    ):
        raise ArtifactError(
            f"--init none changes nothing for {deltas[0].directory}, which records how it started; leave it "
            "out"
        )


def _confirm(option: str, given: str, origin: Origin | None, delta: AdapterDelta) -> None:
    if origin is None:
        raise ArtifactError(
            f"{option} {given} changes nothing for {delta.directory}, which does not need it; leave it out"
        )
    find_model(origin, given, stream=True)
