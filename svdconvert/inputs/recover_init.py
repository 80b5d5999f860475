"""Where the weights lie from which a lost start is found again."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel, find_model, open_model
from svdconvert.inputs.recovered_init import REPEATABLE, RecoveredInit


def recover_init(change: AdapterDelta, base: str | None, residual: str | None) -> AdapterDelta:
    """The change with its start found again, where it is lost; else as it is.

    `base` and `residual` say where the weights are, where change does not know. Raises ArtifactError where
    they do not suffice.
    """
    if not change.is_lost:
        return change
    there = _base(change, base)
    place = residual or (str(change.residual) if change.residual else None)
    started = str(change.after.config.initialised)
    if there is None or (place is None and started not in REPEATABLE):
        raise ArtifactError(
            f"{change.directory} was started as {started}, which changes the base, and its start is not "
            "known; name its initial adapter with --init, what decompose wrote with --residual, or both "
            "--base and --residual, to recover it from their difference"
        )
    known = change.manifest.layout if change.manifest and change.manifest.layout else None
    names = {slot.module: name for name, slot in there.layout(known)[1].slots(there.source.infos).items()}
    if absent := [module for module in change.modules if module not in names]:
        raise ArtifactError(
            f"{change.directory} adapts {absent[0]}, which {there.path} does not have as a matrix of its "
            f"layers ({len(absent)} such modules); give the base that it was made for"
        )
    ranks = {module: change.after.shape(module, "lora_A")[0] for module in change.modules}
    weights = open_model(place).source if place else None
    if weights is not None:
        _same_shapes(there, weights.infos, [names[module] for module in change.modules], str(place))
    # PEFT's OLoRA takes out scale * Q R; its PiSSA divides by the scale first, and a difference has none.
    scaled = weights is None and started == "olora"
    scales = {module: change.after.config.scale(module) if scaled else 1.0 for module in change.modules}
    return replace(change, recovered=RecoveredInit(there.source, weights, names, ranks, scales, started))


def _base(change: AdapterDelta, given: str | None) -> OpenModel | None:
    if given is None and change.manifest is None and change.after.config.base:
        named = Path(change.after.config.base)
        given = str(named) if named.is_dir() else None
    return find_model(change.manifest.base if change.manifest else None, given)


def _same_shapes(base: OpenModel, infos: Mapping[str, TensorInfo], names: list[str], place: str) -> None:
    for name in names:
        if name not in infos or infos[name].shape != base.source.infos[name].shape:
            raise ArtifactError(
                f"{place} has no {name} of the shape that {base.path} has; give the residual of this base"
            )
