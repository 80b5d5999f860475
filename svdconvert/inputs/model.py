"""Models at hand: where the user says, else where a manifest says."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.errors import ArtifactError, CheckpointError
from svdconvert.hub.download import Snapshot, fetch
from svdconvert.hub.remote_source import RemoteSource, Unstreamable
from svdconvert.layouts.base import Layout
from svdconvert.layouts.detect import find_layout, has_signature_tensor
from svdconvert.manifest.origin import fingerprint, same_model
from svdconvert.manifest.schema import PLAIN, Origin, has_manifest, read_manifest
from svdconvert.output.sidecars import CONFIG, read_config


@dataclass(frozen=True)
class OpenModel:
    """A model on this machine, open."""

    snapshot: Snapshot
    source: TensorSource
    config: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Its directory, or its one file."""
        return self.snapshot.path

    def layout(self, name: str | None = None) -> tuple[str, Layout]:
        """The layout called `name`, else the one that fits, with its name. Raises as `find_layout`."""
        return find_layout(name, self.config.get("model_type"), str(self.path), self.source.infos)

    def identity(self) -> dict[str, Any]:
        """What a run that reads it must find again when it goes on."""
        return {
            "location": self.snapshot.location,
            "files": dict(self.source.file_versions()),
            **asdict(self.origin()),
        }

    def origin(self, checksums: Mapping[str, str] | None = None) -> Origin:
        """How a manifest names it, with the checksums of the tensors that were read."""
        print_ = fingerprint(self.config, self.source, checksums or {})
        return Origin(location=self.snapshot.location, revision=self.snapshot.revision, fingerprint=print_)


def open_model(model: str, *, stream: bool = False) -> OpenModel:
    """Fetch and open a model; with `stream`, the weights of one on the Hub stay there.

    Raises CheckpointError where it is not there or damaged.
    """
    snapshot = fetch(model, "sidecars" if stream else "all")
    source = _streamed(snapshot) if stream and snapshot.revision else open_checkpoint(snapshot.path)
    signed = has_signature_tensor(source.infos)
    if snapshot.path.is_file() and not signed:
        raise CheckpointError(
            f"{snapshot.path} is no model that is known by its tensors' names "
            f"(it has {next(iter(source.infos), 'none')}); give a model's directory, and an adapter to merge"
        )
    bare = signed and not (snapshot.path / CONFIG).exists()
    return OpenModel(snapshot, source, {} if bare else read_config(snapshot.path))


def require_plain_checkpoint(model: str, verb: str) -> None:
    """Raise ArtifactError where `model` is a directory of ours whose weights are of no use by themselves."""
    place = fetch(model, "sidecars").path
    if has_manifest(place) and (kind := read_manifest(place).kind) not in PLAIN:
        raise ArtifactError(f"{model} is a {kind} directory; {verb} wants a plain checkpoint")


def open_headers(model: str) -> OpenModel:
    """Open a model that is only looked at: its weights are fetched where nothing else tells their shapes."""
    try:
        return open_model(model, stream=True)
    except Unstreamable:
        return open_model(model)


def _streamed(snapshot: Snapshot) -> TensorSource:
    """The weights where they are: in the cache, if all of them are there already, else on the Hub."""
    try:
        return open_checkpoint(snapshot.path)
    except CheckpointError:
        return RemoteSource(snapshot)


def at(origin: Origin) -> str:
    """The place of a model as a user would write it."""
    return f"{origin.location}@{origin.revision}" if origin.revision else origin.location


def find_model(origin: Origin | None, given: str | None, *, stream: bool = False) -> OpenModel | None:
    """The model of `origin` at the place `given`, else where the manifest says; None where it is not there.

    Raises ArtifactError where what is there is another model, CheckpointError where `given` is wrong.
    """
    if given is None:
        if origin is None:
            return None
        try:
            home = open_model(at(origin), stream=stream)
        except CheckpointError:
            return None
    else:
        home = open_model(given, stream=stream)
    if origin is not None:
        same_model(origin, home.path, home.config, home.source)
    return home
