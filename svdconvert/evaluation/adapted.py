"""Puts what an adapter changes into a network: factors, and parameters that were trained in full."""

from dataclasses import dataclass

from torch import nn

from svdconvert.errors import ArtifactError, SvdConvertError
from svdconvert.inputs.adapted_tensors import is_head, ties_embeddings
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel, find_model, open_model, require_model
from svdconvert.inputs.placed import Projection, expert_names
from svdconvert.inputs.sources import Sources
from svdconvert.layouts.base import Layout
from svdconvert.linalg.delta import as_lora
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.schema import Manifest
from svdconvert.training.model.extra_parameters import fill_parameters
from svdconvert.training.model.inject import ScaledFactors, inject_adapters
from svdconvert.training.start import require_unchanged


@dataclass(frozen=True)
class Weights:
    """The weights that an adapter is used with."""

    model: OpenModel
    is_residual: bool
    """True if the adapter as it is belongs to them; False for a base, which needs the adapter's change."""


def find_weights(delta: AdapterDelta, base: str | None, residual: str | None = None) -> Weights:
    """The residual that an adapter was trained on, or its base if there is none or `base` is given.

    Raises ArtifactError if neither is found, or if stored tensors have changed since they were written.
    """
    manifest = delta.manifest
    if manifest is not None and manifest.kind == "decomposed" and delta.residual is not None:
        own = _own_weights(delta, manifest, base)
        if own is not None:
            return Weights(own, is_residual=True)
    if delta.has_residual and base is None:
        found = _find_residual(delta, residual)
        if found is not None:
            return Weights(found, is_residual=True)
        _refuse_lost_codes(delta)
    return Weights(_find_base(delta, base), is_residual=False)


def _own_weights(delta: AdapterDelta, manifest: Manifest, base: str | None) -> OpenModel | None:
    """The weights in a decomposed directory itself; None if it holds none, or an adapter was given."""
    if delta.residual is None or delta.residual.path != delta.directory or not manifest.files_of("model"):
        return None
    if base is not None:
        raise ArtifactError(
            f"`base` {base} changes nothing: {delta.directory} holds the weights of its adapter; leave it out"
        )
    return open_model(delta.residual.name)


def _find_residual(delta: AdapterDelta, given: str | None) -> OpenModel | None:
    """The residual, from the user or the manifest; None if it is not found."""
    manifest = delta.manifest
    origin = manifest.residual if manifest else None
    named = given or (delta.residual.name if delta.residual else None)
    found = find_model(origin, named)
    if found is not None and manifest is not None and manifest.kind == "decomposed":
        require_unchanged(found.path, found.source, manifest.checksums, "the adapter was made with it")
    if found is not None and origin is not None:
        require_unchanged(
            found.path, found.source, origin.fingerprint.tensors, "the adapter was trained on it"
        )
    return found


def _refuse_lost_codes(delta: AdapterDelta) -> None:
    """Raise ArtifactError if the adapter belongs to a 4-bit residual, which is not the base minus factors."""
    matrices = delta.manifest.matrices.values() if delta.manifest else ()
    if any(matrix.quantised for matrix in matrices):
        raise ArtifactError(
            f"{delta.directory} was trained on a 4-bit residual, which is not found; give the decomposed "
            "directory with `residual`"
        )


def _find_base(delta: AdapterDelta, given: str | None) -> OpenModel:
    manifest = delta.manifest
    if manifest is not None:
        found = require_model(manifest.base, given, delta.directory)
        if manifest.base is not None:
            known = manifest.base.fingerprint.tensors
            require_unchanged(found.path, found.source, known, "the adapter was made")
        return found
    named = given or delta.adapter.config.base
    if named is None:
        raise ArtifactError(f"{delta.directory} does not name its base; give its location with `base`")
    return open_model(named)


def install_adapter(
    network: nn.Module, delta: AdapterDelta, weights: Weights, layout: Layout, base: str | None
) -> None:
    """Put the adapter into the network that was loaded from `weights`.

    Raises ArtifactError if it cannot be used without being merged, or does not fit.
    """
    _refuse_unusable(delta, weights)
    projections = _projections(delta, base)
    paths = _network_paths(weights.model, layout)
    factors = _factors(delta, weights)
    try:
        inject_adapters(network, factors, frozenset(), paths=paths, projections=projections)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; merge it, and evaluate the merged model") from error
    values = {name: delta.parameter(name) for name in delta.adapter.extras}
    fill_parameters(network, values, layout)


def _factors(delta: AdapterDelta, weights: Weights) -> ScaledFactors:
    """Module -> (factors, scale) that must be added to the weights."""
    if weights.is_residual:
        return {module: delta.trained(module) for module in delta.modules}
    found = {}
    for module in delta.modules:
        after, scale = delta.trained(module)
        if delta.initial_adapter is None:
            found[module] = (after, scale)
        else:
            left, right = as_lora(after, scale, *delta.initial(module))
            found[module] = (Factors(left, right), 1.0)
    return found


def _refuse_unusable(delta: AdapterDelta, weights: Weights) -> None:
    advice = f"merge {delta.directory}, and evaluate the merged model"
    if delta.adapter.config.dora:
        raise ArtifactError(f"{delta.directory} is a DoRA adapter, whose change is no product; {advice}")
    if not weights.is_residual and delta.is_lost:
        raise ArtifactError(
            f"{delta.directory} did not start at zero, and its initial adapter is lost; give the residual "
            "that it was trained on with `residual`"
        )
    extras = delta.adapter.extras
    if ties_embeddings(weights.model.config) and any(is_head(name.rpartition(".")[0]) for name in extras):
        raise ArtifactError(
            f"{delta.directory} has its own head, and its model ties the head to the embeddings; {advice}"
        )


def _projections(delta: AdapterDelta, base: str | None) -> dict[str, Projection] | None:
    """Module -> place, for experts with factors of their own."""
    try:
        found = expert_names(delta, Sources(base=base)).projections
    except SvdConvertError:
        return None  # its base is not known, so nothing is known of experts
    return {one.module: one for one in found}


def _network_paths(model: OpenModel, layout: Layout) -> dict[str, str]:
    """Module, as adapters name it -> its path in the network, if the network is svdconvert's own."""
    if layout.family is None:
        return {}
    slots = layout.slots(layout.divided(model.source).infos)
    return {slot.module: layout.network_path(name) for name, slot in slots.items()}
