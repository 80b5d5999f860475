"""Loads what a directory is, ready to answer: a plain model, or an adapter in the weights it belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.config.execution import Run
from svdconvert.errors import ArtifactError, brief
from svdconvert.evaluation.adapted import Weights, find_weights, install_adapter
from svdconvert.evaluation.fast_linears import use_fast_products
from svdconvert.evaluation.sound_network import require_sound
from svdconvert.hub.download import Snapshot, fetch
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel, open_model
from svdconvert.inputs.open_adapter import is_any_adapter, open_adapter_delta
from svdconvert.inputs.sources import Sources
from svdconvert.inputs.unused_sources import check_unused
from svdconvert.layouts.base import Layout
from svdconvert.layouts.loading import auto_class, is_encoder_decoder
from svdconvert.linalg.threads import pick_device
from svdconvert.manifest.compared import sidecar_remarks
from svdconvert.manifest.evaluations import EvaluatedModel, manifest_fingerprint
from svdconvert.manifest.fingerprint import digest, tensor_checksum
from svdconvert.manifest.schema import Manifest, has_manifest, read_manifest, training_of
from svdconvert.training.model.load import load_classifier, load_network, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLASSIFIER = "AutoModelForSequenceClassification"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What answers, before its weights are loaded."""

    weights: OpenModel
    layout: Layout
    adapter: tuple[AdapterDelta, Weights] | None
    labels: tuple[str, ...] | None
    """The classes of a classifier, in order; empty for one number; None for a model that writes text."""
    identity: EvaluatedModel
    base: str | None
    """The base's location, if the user gave it."""
    manifest: Manifest | None = None
    """That of the directory, if svdconvert wrote it."""
    directory: Path
    """What was opened."""

    @property
    def base_name(self) -> str:
        """The location of the untouched model, by which published scores are found."""
        origin = self.manifest.base if self.manifest else None
        return origin.location if origin else self.weights.snapshot.location

    @property
    def trained_on(self) -> list[str]:
        """The names of the data that it was trained on, if they are known."""
        training = training_of(self.directory, self.manifest) if self.manifest else None
        return training.data if training else []

    def load(self, dtype: str, run: Run) -> nn.Module:
        """The network on the run's device, in `dtype` or, for "auto", as it is stored.

        Raises CheckpointError, TargetError or ArtifactError if it cannot be loaded, or lacks weights.
        """
        infos = self.weights.source.infos
        self.weights.refuse_codes(infos, self.layout.slots(infos))
        chosen: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
        if self.labels is None:
            network = load_network(self.weights.sidecars, self.layout, chosen, run)
        else:
            network = self._classifier(chosen, run)
        if self.adapter is not None:
            install_adapter(network, *self.adapter, self.layout, self.base)
        network.requires_grad_(False)
        network = network.eval().to(pick_device(run.device, run.ranks.local))
        require_sound(network, self.directory)
        use_fast_products(network)
        return network

    def _classifier(self, dtype: torch.dtype | None, run: Run) -> nn.Module:
        """The network with its head, all of whose weights must come from a file."""
        network, new = load_classifier(self.weights.sidecars, self.layout, dtype, self.labels or (), 0, run)
        known = {self.layout.runtime_name(name) for name in self.weights.source.infos}
        if self.adapter is not None:
            known |= set(self.adapter[0].adapter.extras)
        if absent := sorted(set(new) - known):
            raise ArtifactError(
                f"{self.weights.path} has no {absent[0]}, so its classes would be drawn at random; give a "
                "classifier that was trained"
            )
        return network

    def tokenizer(self, run: Run) -> "PreTrainedTokenizerBase":
        """The tokenizer of the weights."""
        return load_tokenizer(self.weights.sidecars, self.layout, trust_remote_code=run.trust_remote_code)


def open_answering(
    model: str | Path, run: Run, *, base: str | None = None, residual: str | None = None
) -> Opened:
    """Open a directory of any kind, an adapter in PEFT's format, or a model of the Hub.

    `base` and `residual` override the locations of what an adapter belongs to. Raises SvdConvertError if
    something is missing, does not fit, or cannot answer.
    """
    if is_any_adapter(model):
        return _open_adapted(str(model), run, base, residual)
    for option, given in (("base", base), ("residual", residual)):
        if given is not None:
            raise ArtifactError(
                f"`{option}` {given} changes nothing: {model} needs no other weights; leave it out"
            )
    opened = open_model(str(model))
    _refuse_silent(opened)
    manifest = _manifest(opened.snapshot)
    opened.require_unchanged()
    _remark(opened.path, run)
    return Opened(
        weights=opened,
        layout=_layout(opened, manifest, run),
        adapter=None,
        labels=_labels(opened.config, opened.config),
        identity=_identity(opened.snapshot, manifest, "plain", [opened.source]),
        base=None,
        manifest=manifest,
        directory=opened.path,
    )


def _open_adapted(model: str, run: Run, base: str | None, residual: str | None) -> Opened:
    sources = Sources(base=base, residual=residual, trust_remote_code=run.trust_remote_code)
    delta = open_adapter_delta(model, sources)
    weights = find_weights(delta, base, residual)
    check_unused(delta, sources, base_used=not weights.is_residual, residual_used=weights.is_residual)
    opened = weights.model
    _refuse_silent(opened)
    opened.require_unchanged()
    head = delta.manifest.head if delta.manifest else None
    owner = fetch(model, "sidecars")
    _remark(opened.path, run)
    own = _manifest(owner)
    return Opened(
        weights=opened,
        layout=_layout(opened, delta.manifest, run),
        adapter=(delta, weights),
        labels=_labels(opened.config, head or opened.config),
        identity=_identity(owner, own, "adapter", [delta.adapter.source, opened.source]),
        base=base,
        manifest=own,
        directory=owner.path,
    )


def _remark(path: Path, run: Run) -> None:
    if run.ranks.leads:
        for remark in sidecar_remarks([path]):
            run.notify(remark)


def _manifest(snapshot: Snapshot) -> Manifest | None:
    return read_manifest(snapshot.path) if has_manifest(snapshot.path) else None


def _refuse_silent(model: OpenModel) -> None:
    """Raise ArtifactError for weights from which no network that answers is loaded."""
    if is_encoder_decoder(model.config):
        raise ArtifactError(
            f"{model.path} is an encoder with a decoder ({brief(model.config.get('model_type'))}); only "
            "models that continue a text, and classifiers, answer here"
        )


def _layout(model: OpenModel, manifest: Manifest | None, run: Run) -> Layout:
    name = manifest.layout or None if manifest else None
    return replace(model, trust_remote_code=run.trust_remote_code).layout(name)[1]


def _labels(config: Mapping[str, Any], head: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The classes that `head` describes; empty for one number; None if the model writes text."""
    is_classifier = head is not config or auto_class(config) == _CLASSIFIER
    if not is_classifier:
        return None
    if head.get("problem_type") == "regression":
        return ()
    names = head.get("id2label")
    if not isinstance(names, Mapping) or not names:
        count = head.get("num_labels", 2)
        return tuple(f"LABEL_{number}" for number in range(count if isinstance(count, int) else 2))
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _identity(
    snapshot: Snapshot, manifest: Manifest | None, kind: str, sources: Sequence[TensorSource]
) -> EvaluatedModel:
    """Which model it is; without a manifest, every tensor of `sources` is read for its checksum."""
    name = snapshot.hub_id or snapshot.path.absolute().name
    if manifest is None:
        sums = [[one, tensor_checksum(source, one)] for source in sources for one in sorted(source.infos)]
        return EvaluatedModel(kind=kind, fingerprint=digest(sums), name=name)
    ranks = [matrix.rank for matrix in manifest.matrices.values()]
    training = manifest.training.rank if manifest.training else None
    rank = getattr(manifest.result, "rank", None) or max(ranks, default=training)
    return EvaluatedModel(
        kind=manifest.kind,
        fingerprint=manifest_fingerprint(manifest),
        name=name,
        method=manifest.method or None,
        rank=rank,
    )
