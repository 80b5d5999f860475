"""Which files of a directory are uploaded: those that its manifest lists and that loaders read."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from svdconvert.checkpoint.file_names import is_known_kind, name_fault, refuse_links_outside
from svdconvert.checkpoint.safetensors_files import INDEX
from svdconvert.errors import ArtifactError, brief
from svdconvert.hub.reference import is_repository
from svdconvert.manifest.schema import PLAIN, Manifest, Origin
from svdconvert.manifest.training import METRICS
from svdconvert.output.journal import journals
from svdconvert.output.ownership import MANIFEST_NAME
from svdconvert.output.shard_uploads import UPLOADS
from svdconvert.output.sidecars import is_sidecar, read_json_object

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class SourceRepos:
    """The repositories that a directory belongs to, as far as they are known."""

    base: Origin | None
    residual: Origin | None

    @property
    def base_id(self) -> str | None:
        """org/name of the untouched model."""
        return _repository(self.base)

    @property
    def residual_id(self) -> str | None:
        """org/name of the residual base."""
        return _repository(self.residual)


def _repository(origin: Origin | None) -> str | None:
    """org/name of a model of the Hub, without the file that it may be."""
    return "/".join(origin.location.split("/")[:2]) if origin and origin.revision else None


@dataclass(frozen=True)
class UploadFiles:
    """The files to upload: path in the repository -> a local file, or its content."""

    files: Mapping[str, Path | bytes]
    unsent: list[str]
    """Files of the directory that are not uploaded."""

    @property
    def nbytes(self) -> int:
        """Of all files together."""
        return sum(
            content.stat().st_size if isinstance(content, Path) else len(content)
            for content in self.files.values()
        )


def resolve_source_repos(manifest: Manifest, base: str | None, residual: str | None) -> SourceRepos:
    """The repositories of a manifest; `base` and `residual` name those that were read from a local place.

    Raises ArtifactError if what is named is another model, or the directory was made without such a model,
    CheckpointError if it does not exist.
    """
    return SourceRepos(
        _confirmed("base", manifest, manifest.base, base),
        _confirmed("residual", manifest, manifest.residual, residual),
    )


def unnamed_models(manifest: Manifest, repos: SourceRepos) -> list[str]:
    """A sentence for each model that the card cannot name, because it was read from a local directory."""
    needed = {"base": repos.base}
    if manifest.kind == "trained" and manifest.base_is_residual:
        needed["residual"] = repos.residual
    return [
        f"the {role} {Path(origin.location).name} is a local directory, so the card cannot name it: visitors "
        f"do not learn what {_use_of(role, manifest)}; give --{role} ORG/NAME"
        for role, origin in needed.items()
        if origin is not None and not origin.revision
    ]


def _use_of(role: str, manifest: Manifest) -> str:
    """What a visitor needs to know of a model that the card does not name."""
    is_adapter = manifest.kind in ("trained", "lora") or not (manifest.kind in PLAIN or manifest.checksums)
    on_residual = manifest.kind == "trained" and manifest.base_is_residual
    loads = is_adapter and (role == "residual") == on_residual
    return "to load the adapter on" if loads else "it was made from"


def _confirmed(role: str, manifest: Manifest, origin: Origin | None, given: str | None) -> Origin | None:
    if given is None:
        return origin
    if origin is None:
        raise ArtifactError(
            f"--{role} {brief(given)} changes nothing: a directory of the kind {manifest.kind} does not "
            f"depend on a {role}; leave it out"
        )
    from svdconvert.inputs.model import find_model  # and torch with it

    home = find_model(origin, given, stream=True)
    assert home is not None
    return replace(origin, location=home.snapshot.location, revision=home.snapshot.revision)


def collect_files(directory: Path, manifest: Manifest, repository: str, repos: SourceRepos) -> UploadFiles:
    """Everything of `directory` that goes into `repository`, except a card.

    Raises ArtifactError if the manifest names a file that is hidden, outside the directory or of an unknown
    kind, CheckpointError for a symbolic link that ends outside the directory.
    """
    files: dict[str, Path | bytes] = {MANIFEST_NAME: b""}
    files |= _own_files(directory, manifest)
    weights_of = repository if manifest.kind == "decomposed" else repos.residual_id
    named = weights_of if manifest.base_is_residual else repos.base_id
    homes = {Path(name).parent for name in manifest.files} | {Path()}
    unsent = []
    # Folders that are links are not entered; a linked folder of the manifest is refused below.
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        place = path.relative_to(directory)
        if path.name == ADAPTER_CONFIG and place.parent in homes:
            refuse_links_outside([path], directory)
            files[place.as_posix()] = _with_base(read_json_object(path), named)
        elif place.as_posix() in (INDEX, METRICS) or is_sidecar(path, directory):
            files.setdefault(place.as_posix(), path)
        elif place.as_posix() not in files:
            unsent.append(place.as_posix())
    for path in (*journals(directory), directory / UPLOADS):  # of a directory that is still being made
        files.pop(path.name, None)
    files[MANIFEST_NAME] = _as_bytes(asdict(replace(manifest, sidecars=_sent_sidecars(manifest, files))))
    refuse_links_outside([content for content in files.values() if isinstance(content, Path)], directory)
    return UploadFiles(files, unsent)


def _own_files(directory: Path, manifest: Manifest) -> dict[str, Path | bytes]:
    """The files of the manifest that are still here; those that are uploaded already are not."""
    for name in manifest.files:
        if name_fault(name) or not is_known_kind(name):
            raise ArtifactError(
                f"{directory} names {name!r} as its own file, which is never published; restore the manifest"
            )
    return {name: directory / name for name in manifest.files if (directory / name).exists()}


def _sent_sidecars(manifest: Manifest, files: Mapping[str, Path | bytes]) -> dict[str, str]:
    """The checksums of the sidecars as uploaded: some are not, some name the base's repository instead."""
    return {
        name: xxhash.xxh3_64_hexdigest(content) if isinstance(content, bytes) else manifest.sidecars[name]
        for name, content in files.items()
        if name in manifest.sidecars
    }


def without_local_paths(manifest: Manifest, repos: SourceRepos) -> Manifest:
    """The manifest without the paths of this machine."""
    training = manifest.training
    return replace(
        manifest,
        base=_elsewhere(repos.base),
        residual=_elsewhere(repos.residual),
        options=_without_paths(manifest.options),
        training=training and replace(training, options=_without_paths(training.options)),
    )


def _without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _without_path(value) for key, value in options.items()}


def _elsewhere(origin: Origin | None) -> Origin | None:
    return replace(origin, location=_without_path(origin.location)) if origin else None


def _without_path(value: Any) -> Any:
    """A path's last component, also in a list; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [_without_path(one) for one in value]
    is_path = isinstance(value, str) and (Path(value).is_absolute() or value.startswith((".", "~")))
    return Path(value).name if is_path else value


def _with_base(config: Mapping[str, Any], named: str | None) -> bytes:
    """An adapter's configuration that names the weights it belongs to, and no directory of this machine."""
    own = config.get("base_model_name_or_path")
    base = own if is_repository(own) and not Path(str(own)).exists() else named
    return _as_bytes({**config, "base_model_name_or_path": base}, indent=2)


def _as_bytes(value: Mapping[str, Any], indent: int = 1) -> bytes:
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
