"""The door in: a model reference becomes a local directory."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Literal

from svdconvert.checkpoint.safetensors_files import (
    ENDINGS,
    INDEX,
    PICKLED_INDEX,
    PICKLED_SINGLE,
    SINGLE,
    read_index,
    shard_names,
)
from svdconvert.errors import CheckpointError, ModelNotFoundError
from svdconvert.hub.auth import explained, patiently, transport_errors, use_token
from svdconvert.hub.reference import ModelRef

Part = Literal["all", "adapter", "sidecars"]
"""What is fetched: everything a loader needs, that without the model's own weights, or no weights."""

# What loaders read beside the weights, at the root and in the folders of templates and initial adapters.
_SIDECARS = ("*.json", "*.jsonl", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*")
_ADAPTER = "adapter_model.safetensors"
_FOLDERS = ("*_init", "additional_chat_templates")
_LEAST = ("config.json", "adapter_config.json")  # without which a snapshot in the cache is none
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model on this machine, and where it came from."""

    path: Path
    location: str
    """The absolute path, or org/name."""
    revision: str | None = None
    """The commit, for a model of the Hub."""

    @property
    def hub_id(self) -> str | None:
        """org/name for a model of the Hub."""
        return self.location if self.revision else None

    @property
    def name(self) -> str:
        """What fetches the same again."""
        return f"{self.location}@{self.revision}" if self.revision else str(self.path)


def fetch(model: str, part: Part = "all") -> Snapshot:
    """The directory of `model`, downloaded into the Hub's cache where it is not local.

    Only what is needed is fetched, at one commit, and weights are compared with their SHA-256 when they
    arrive. Raises ModelNotFoundError if neither this machine nor the Hub has it, CheckpointError if the Hub
    cannot be reached, refuses access or sends damaged files.
    """
    reference = ModelRef.parse(model)
    if reference.path is not None:
        return Snapshot(reference.path, str(reference.path.absolute()))
    assert reference.repository is not None
    use_token()
    with explained(reference.repository, reference.revision, kind=CheckpointError):
        path = _download(reference, part)
    if reference.file is None:
        return Snapshot(path, reference.repository, path.name)
    return Snapshot(path / reference.file, f"{reference.repository}/{reference.file}", path.name)


def _download(reference: ModelRef, part: Part) -> Path:
    """The snapshot in the cache with all that `part` asks for."""
    from huggingface_hub import snapshot_download

    repository, revision = str(reference.repository), reference.revision
    known = _known_files(repository, revision)
    if known is None:  # out of reach: the cache may have it, and what it lacks is missed when it is read
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*_LEAST]))
    commit, files = known
    wanted = [name for name in files if _is_sidecar(name)]
    wanted += [reference.file] if reference.file else _weights(repository, commit, files, part)
    if absent := [name for name in wanted if name not in files]:
        raise ModelNotFoundError(f"{repository} has no {absent[0]}; check the name of the file")
    before = {name for name in wanted if files[name] and _cached(repository, commit, name)}
    # By the revision's own name, so that the cache knows it too when the Hub is out of reach.
    exactly = [escape(name) for name in wanted]
    path = Path(patiently(lambda: snapshot_download(repository, revision=revision, allow_patterns=exactly)))
    if path.name != commit:
        return _download(reference, part)  # somebody has pushed meanwhile
    for name in wanted:
        if (sha256 := files[name]) and name not in before and _sha256(path / name) != sha256:
            _fetch_again(repository, commit, path / name, name, sha256)
    return path


def _known_files(repository: str, revision: str | None) -> tuple[str, dict[str, str | None]] | None:
    """(commit, file -> SHA-256 where it is a large one), or None where the Hub is out of reach."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = patiently(lambda: HfApi().model_info(repository, revision=revision, files_metadata=True))
    except (OfflineModeIsEnabled, HfHubHTTPError, transport_errors()[0]) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        return None
    assert info.sha is not None
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    return info.sha, files


def _is_sidecar(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    place = not folder or any(fnmatchcase(folder, pattern) for pattern in _FOLDERS)
    return place and any(fnmatchcase(file, pattern) for pattern in _SIDECARS)


def _weights(repository: str, commit: str, files: Collection[str], part: Part) -> Iterator[str]:
    """The weights that are read: the adapters', and of the model's own one kind only."""
    if part == "sidecars":
        return
    for name in files:
        folder, _, file = name.rpartition("/")
        if file == _ADAPTER and (not folder or fnmatchcase(folder, "*_init")):
            yield name
    if part == "all":
        yield from _own_weights(repository, commit, files)


def _own_weights(repository: str, commit: str, files: Collection[str]) -> list[str]:
    for index, single in ((INDEX, SINGLE), (PICKLED_INDEX, PICKLED_SINGLE)):
        if index in files:
            return [name for name in _shards(repository, commit, index) if name in files]
        if single in files:
            return [single]
    lone = [name for name in files if name.endswith(ENDINGS) and "/" not in name]
    if len(lone) > 1:
        raise CheckpointError(
            f"{repository} holds {len(lone)} checkpoints; name one of them, as {repository}/{lone[0]}"
        )
    return lone


def _shards(repository: str, commit: str, index: str) -> list[str]:
    from huggingface_hub import hf_hub_download

    return shard_names(read_index(Path(hf_hub_download(repository, index, revision=commit))))


def _cached(repository: str, commit: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, name, revision=commit), str)


def _fetch_again(repository: str, commit: str, path: Path, name: str, sha256: str) -> None:
    """Fetch a file anew that arrived damaged. Raises CheckpointError where it does so twice."""
    from huggingface_hub import hf_hub_download

    for attempt in (1, 2):
        path.resolve().unlink()
        path.unlink(missing_ok=True)  # the link to it
        if attempt == 1:
            hf_hub_download(repository, name, revision=commit)
            if _sha256(path) == sha256:
                return
    raise CheckpointError(
        f"{name} of {repository} arrived damaged twice: its SHA-256 is not {sha256}, which the Hub lists; "
        "run the same command again, on another network if you can"
    )


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def weight_files(snapshot: Snapshot) -> tuple[list[str], Mapping[str, str] | None]:
    """(safetensors files, tensor -> file where there is an index) of a model whose weights are not here.

    Raises CheckpointError where its index is damaged.
    """
    if not (snapshot.path / INDEX).exists():
        return [SINGLE], None
    weight_map = read_index(snapshot.path / INDEX)
    return shard_names(weight_map), weight_map
