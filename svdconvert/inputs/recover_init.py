"""Recovers a lost initial adapter: finds the weights from which it can be computed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapted_tensors import adapted_tensors
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.init_evidence import refuse_hidden_init
from svdconvert.inputs.model import OpenModel, find_model, open_model
from svdconvert.inputs.recovered_init import REPEATABLE, RecoveredInit
from svdconvert.inputs.sources import Sources
from svdconvert.inputs.unused_sources import check_unused


def settle_init(delta: AdapterDelta, sources: Sources, *, base_used: bool = False) -> AdapterDelta:
    """The delta with a known initial adapter: stored, recovered, or confirmed by the weights to be zero.

    `base_used` is True if the command needs the base in any case. Raises ArtifactError if the initial adapter
    is unknown and the base, which is needed to determine it, is not found.
    """
    needs_weights = delta.is_lost or delta.is_assumed_zero
    check_unused(delta, sources, base_used=base_used or needs_weights)
    if not delta.is_assumed_zero:
        return recover_init(delta, sources)
    base = find_base(delta, sources)
    if base is None:
        raise ArtifactError(
            f"{delta.directory} does not record its initial state; give its base with --base to determine "
            "it, the decomposed directory with --residual, its initial adapter with --init, or --init none "
            "if it started at zero"
        )
    refuse_hidden_init(delta, base)
    return delta


def recover_init(delta: AdapterDelta, sources: Sources, base: OpenModel | None = None) -> AdapterDelta:
    """The delta with its initial adapter recovered if that is lost, else unchanged.

    `base` is the base if it is open already; otherwise it is opened where `sources` says or, by default, at
    the location in the manifest or in the adapter's configuration. Raises ArtifactError if the weights do
    not suffice.
    """
    if not delta.is_lost:
        return delta
    base = base or find_base(delta, sources)
    method = str(delta.adapter.config.initialised)
    if base is None or (delta.residual is None and method not in REPEATABLE):
        raise lost_init(delta)
    names = adapted_tensors(delta, base)
    if absent := [module for module in delta.modules if module not in names]:
        raise ArtifactError(
            f"{delta.directory} adapts {absent[0]}, which {base.path} ties to its embeddings, and its "
            "initial adapter cannot be recovered for that; give it with --init"
        )
    ranks = {module: delta.adapter.shape(module, "lora_A")[0] for module in delta.modules}
    layout = base.layout(delta.layout_name)[1]
    source = layout.divided(base.source)
    residual = None
    if delta.residual is not None:
        residual = layout.divided(open_model(delta.residual.name).source)
        tensors = [share.tensor for shares in names.values() for share in shares]
        _refuse_other_shapes(base, source.infos, residual.infos, tensors, delta.residual.path)
    # PEFT's OLoRA subtracts scale * Q R. Its PiSSA divides by the scale first, and a difference has no scale.
    scaled = residual is None and method == "olora"
    scales = {module: delta.adapter.config.scale(module) if scaled else 1.0 for module in delta.modules}
    return replace(delta, recovered=RecoveredInit(source, residual, names, ranks, scales, method))


def lost_init(delta: AdapterDelta) -> ArtifactError:
    """The error for an initial adapter that is needed, not stored, and cannot be recovered."""
    started = delta.adapter.config.initialised
    how = f"as {started}" if isinstance(started, str) else "as a part of its base"
    return ArtifactError(
        f"{delta.directory} was initialised {how}, so it belongs to a residual, and its initial state is "
        "unknown; give its initial adapter with --init, the decomposed directory with --residual, or both "
        "--base and --residual, to recover it from their difference"
    )


def find_base(delta: AdapterDelta, sources: Sources) -> OpenModel | None:
    """The base that is given, in the manifest, or in the configuration of a foreign adapter; None without."""
    return _find_base(delta, sources, stream=False)


def find_base_sidecars(delta: AdapterDelta, sources: Sources) -> OpenModel | None:
    """As `find_base`, of which only the headers and config.json will be read."""
    return _find_base(delta, sources, stream=True)


def _find_base(delta: AdapterDelta, sources: Sources, *, stream: bool) -> OpenModel | None:
    origin = delta.manifest.base if delta.manifest else None
    given = sources.base
    named = delta.adapter.config.base
    if given is None and (origin if stream else delta.manifest) is None and named and Path(named).is_dir():
        given = named
    return find_model(origin, given, stream=stream, trust_remote_code=sources.trust_remote_code)


def _refuse_other_shapes(
    base: OpenModel,
    infos: Mapping[str, TensorInfo],
    others: Mapping[str, TensorInfo],
    names: list[str],
    residual: Path,
) -> None:
    for name in names:
        if name not in others or others[name].shape != infos[name].shape:
            raise ArtifactError(
                f"{residual} has no {name} of the shape that {base.path} has; give the residual of this base"
            )
