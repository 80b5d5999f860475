"""Opens models that the user or a manifest names."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from svdconvert.checkpoint.gguf_file import GgufFile
from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.errors import ArtifactError, CheckpointError, ModelNotFoundError
from svdconvert.hub.download import Snapshot, fetch
from svdconvert.hub.remote_source import RemoteSource, Unstreamable
from svdconvert.inputs.storage_format import decoded, refuse_codes, refuse_unknown_format
from svdconvert.layouts.base import LAYOUTS, Layout
from svdconvert.layouts.detect import has_signature_tensor, layout_of_model
from svdconvert.manifest.compared import ComparedSource, compared
from svdconvert.manifest.origin import fingerprint, same_model
from svdconvert.manifest.schema import PLAIN, Origin, has_manifest, read_manifest
from svdconvert.models.gguf_sidecars import write_sidecars
from svdconvert.output.sidecars import CONFIG, has_config, read_config, refuse_foreign_sidecars
from svdconvert.quantization.view import DecodedSource


@dataclass(frozen=True)
class OpenModel:
    """A model whose headers have been read."""

    snapshot: Snapshot
    source: TensorSource
    """Its tensors; quantised weights are decoded."""
    config: Mapping[str, Any]
    """config.json; empty for a single file without one next to it."""
    sidecars: Path
    """The directory, or the single file, that the files next to the weights are copied from.

    Networks and tokenizers are loaded from it. It differs from `path` for a GGUF file, and then lasts as long
    as `source`."""
    trust_remote_code: bool = False
    """True if code of the model's repository may run, to find its layout."""

    @property
    def path(self) -> Path:
        """Its directory, or its single file."""
        return self.snapshot.path

    @property
    def is_decoded(self) -> bool:
        """True if weights of the checkpoint are quantised, and `source` decodes them."""
        return isinstance(self.source, DecodedSource)

    def require_unchanged(self) -> None:
        """Read the weights if svdconvert wrote them. Raises ArtifactError if they have changed since.

        For networks, which are loaded without `source`. What has been read from it is not read again.
        """
        stored = self.source.stored if isinstance(self.source, DecodedSource) else self.source
        if isinstance(stored, ComparedSource):
            stored.require_all()

    def refuse_unknown_format(self) -> None:
        """Raise TargetError if the checkpoint is quantised in a way that is not known."""
        refuse_unknown_format(self.path, self.config, self.source)

    def refuse_codes(self, infos: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
        """Raise TargetError if one of the matrices `names` of `infos` is stored as codes."""
        refuse_codes(self.path, self.config, infos, names)

    def layout(self, name: str | None = None) -> tuple[str, Layout]:
        """(name, layout): the layout called `name`, else the one that fits. Raises as `layout_of_model`."""
        if name is None and not self.config and not has_signature_tensor(self.source.infos):
            first = next(iter(self.source.infos), "none")
            raise CheckpointError(
                f"{self.path} has tensors of no known layout (such as {first}) and no {CONFIG} next to "
                "it; give a model's directory, an adapter to merge, or --layout names"
            )
        return layout_of_model(
            name, self.path, self.config, self.source.infos, trust_remote_code=self.trust_remote_code
        )

    def identity(self) -> dict[str, Any]:
        """Describes the model: an interrupted run continues only if this is unchanged."""
        return {
            "location": self.snapshot.location,
            "files": dict(self.source.file_versions()),
            **asdict(self.origin()),
        }

    def origin(self, checksums: Mapping[str, str] | None = None) -> Origin:
        """The manifest's entry for this model, with the checksums of the tensors that were read."""
        return Origin(
            location=self.snapshot.location,
            revision=self.snapshot.revision,
            fingerprint=fingerprint(self.config, self.source, checksums or {}),
        )


def open_model(model: str, *, stream: bool = False, trust_remote_code: bool = False) -> OpenModel:
    """Open a model: a directory, a single file, or org/name[@revision].

    With `stream` the weights of a Hub model are read by range requests instead of downloaded. With
    `trust_remote_code`, code of its repository may run, to find its layout. Raises ModelNotFoundError if
    there is none, CheckpointError if it is damaged or the Hub does not answer.
    """
    snapshot = fetch(model, "sidecars" if stream else "all")
    return replace(_opened(snapshot, stream=stream), trust_remote_code=trust_remote_code)


def open_plain_model(
    model: str, command: str, *, stream: bool = False, trust_remote_code: bool = False
) -> OpenModel:
    """Open a model that `command` reads as a plain checkpoint.

    Raises ArtifactError, before any weights are downloaded, for a directory that svdconvert wrote and whose
    weights are only usable together with an adapter.
    """
    sidecars = fetch(model, "sidecars")
    refuse_adapted(model, sidecars, command)
    if stream or sidecars.revision is None:
        opened = _opened(sidecars, stream=stream)
    else:
        opened = _opened(fetch(sidecars.name), stream=False)
    return replace(opened, trust_remote_code=trust_remote_code)


def refuse_adapted(model: str, sidecars: Snapshot, command: str) -> None:
    """Raise ArtifactError for a directory whose weights are only usable together with an adapter."""
    manifest = read_manifest(sidecars.path) if has_manifest(sidecars.path) else None
    if manifest is not None and manifest.kind not in PLAIN:
        raise ArtifactError(f"{model} is a {manifest.kind} directory; {command} needs a plain checkpoint")


def open_headers(model: str, command: str | None = None, *, trust_remote_code: bool = False) -> OpenModel:
    """Open a model to read its headers only; weights are downloaded only if the headers cannot be read alone.

    With `command`, the model must be a plain checkpoint, as in `open_plain_model`.
    """
    try:
        opened = open_plain_model(model, command, stream=True) if command else open_model(model, stream=True)
    except Unstreamable:
        opened = open_model(model)
    return replace(opened, trust_remote_code=trust_remote_code)


def layout_of_weights(name: str, path: Path) -> Layout:
    """The layout `name` of a manifest, whose weights are in `path`.

    Their headers are only read if the layout depends on them.
    """
    if name in LAYOUTS.names():
        return LAYOUTS.get(name)
    return open_headers(str(path)).layout(name)[1]


def find_model(
    origin: Origin | None, given: str | None, *, stream: bool = False, trust_remote_code: bool = False
) -> OpenModel | None:
    """The model of `origin`, at `given` or else at the manifest's location; None if it is absent there.

    Raises ArtifactError if another model is found, CheckpointError if the model is damaged, if the Hub does
    not answer, or if `given` does not exist.
    """
    settings = {"stream": stream, "trust_remote_code": trust_remote_code}
    if given is not None:
        found = open_model(given, **settings)
    elif origin is None:
        return None
    else:
        try:
            found = open_model(format_reference(origin), **settings)
        except ModelNotFoundError:
            return None
    if origin is not None:
        same_model(origin, found.path, found.config, found.source)
    return found


def require_model(origin: Origin | None, given: str | None, owner: object) -> OpenModel:
    """The base of `owner` as `find_model` finds it. Raises ArtifactError if it is absent."""
    found = find_model(origin, given)
    if found is None:
        location = origin.location if origin else "unknown"
        raise ArtifactError(f"the base of {owner} is not found ({location}); give its location with --base")
    return found


def format_reference(origin: Origin) -> str:
    """A model's location as a user would type it."""
    return f"{origin.location}@{origin.revision}" if origin.revision else origin.location


def _opened(snapshot: Snapshot, *, stream: bool) -> OpenModel:
    refuse_foreign_sidecars(snapshot.path)
    streamed = stream and snapshot.revision is not None
    source = _streamed(snapshot) if streamed else open_checkpoint(snapshot.path)
    if isinstance(source, GgufFile):
        return _opened_gguf(snapshot, source)
    config = _config_of(snapshot.path, source)
    source = compared(source, snapshot.path)
    return OpenModel(snapshot, decoded(source, config, snapshot.path), config, snapshot.path)


def _config_of(path: Path, source: TensorSource) -> dict[str, Any]:
    """config.json; empty for a single file without one, and for a directory whose tensors need none."""
    if has_config(path):
        return read_config(path if path.is_dir() else path.parent)
    if path.is_dir() and not has_signature_tensor(source.infos):
        return read_config(path)
    return {}


def _opened_gguf(snapshot: Snapshot, source: GgufFile) -> OpenModel:
    """A GGUF file. Its configuration and tokenizer are written into a temporary directory, next to a link to
    the file, so that networks are loaded from there as from any other model's directory."""
    found = decoded(source, {}, snapshot.path)
    directory = Path(mkdtemp(prefix="svdconvert-gguf-"))
    finalize(source, rmtree, directory, ignore_errors=True)  # at the latest when the program ends
    write_sidecars(source.path, directory)
    (directory / "model.gguf").symlink_to(source.path.resolve())
    return OpenModel(snapshot, found, read_config(directory), directory)


def _streamed(snapshot: Snapshot) -> TensorSource:
    """The weights in the local cache if they are complete there, else on the Hub."""
    try:
        return open_checkpoint(snapshot.path)
    except CheckpointError:
        return RemoteSource(snapshot)
