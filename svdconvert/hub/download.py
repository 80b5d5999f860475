"""Download a model of the Hub into the cache, as far as it is needed."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Literal, NamedTuple

from svdconvert.checkpoint.file_names import is_weights
from svdconvert.checkpoint.safetensors_files import (
    ENDINGS,
    INDEX,
    PICKLED_INDEX,
    PICKLED_SINGLE,
    SINGLE,
    directory_of,
    read_index,
    shard_names,
)
from svdconvert.config.progress import report
from svdconvert.errors import CheckpointError, ModelNotFoundError
from svdconvert.hub.auth import endpoint, hub_api
from svdconvert.hub.errors import hub_errors_as, is_unanswered, with_retries
from svdconvert.hub.reference import ModelRef, is_repository
from svdconvert.hub.replies import is_commit, listed_files, listed_sizes
from svdconvert.hub.transfers import download_followed

Part = Literal["all", "adapter", "sidecars"]
"""What is downloaded: everything a loader needs, the same without the model's own weights, or no weights."""

# What loaders read in addition to weights, in the root, in templates' and in initial adapters' folders; and
# the results of evaluations.
_SIDECARS = ("*.json", "*.jsonl", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*")
_ADAPTER = "adapter_model.safetensors"
_PICKLED_ADAPTER = "adapter_model.bin"
_OTHER_ADAPTERS = ("adapters.safetensors", "adapter.gguf")  # mlx-lm's and llama.cpp's
_FOLDERS = ("*_init", "additional_chat_templates", "evaluations")
_MODULES = "[0-9]_*"  # 1_Pooling, 2_Dense: a sentence encoder's own layers, with their weights
_REQUIRED = ("config.json", "adapter_config.json")  # a cached snapshot has one of them
_BLOCK = 1 << 20
_ATTEMPTS = 2  # downloads of a revision that moves to another commit meanwhile


class Listing(NamedTuple):
    """The files of a repository at one commit."""

    commit: str
    files: Mapping[str, str | None]
    """File -> SHA-256 if it is stored in LFS, else None."""
    sizes: Mapping[str, int]
    """File -> bytes, as far as the Hub says."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model on this machine, and its origin."""

    path: Path
    location: str
    """The absolute path, or org/name."""
    revision: str | None = None
    """The commit, for a model of the Hub, else None."""

    @property
    def hub_id(self) -> str | None:
        """org/name for a model of the Hub, else None."""
        return self.location if self.revision else None

    @property
    def name(self) -> str:
        """The argument of `fetch` that returns the same snapshot."""
        return f"{self.location}@{self.revision}" if self.revision else str(self.path)


def fetch(model: str, part: Part = "all", without: Collection[str] = ()) -> Snapshot:
    """The directory of `model`; a model of the Hub is downloaded into huggingface_hub's cache.

    All files are of one commit, and the SHA-256 of downloaded weights is compared with the Hub's. Files in
    `without` are not downloaded.
    Raises ModelNotFoundError if neither this machine nor the Hub has it, CheckpointError if the Hub is out of
    reach, refuses access or sends damaged files.
    """
    reference = ModelRef.parse(model)
    if reference.path is not None:
        path = directory_of(reference.path)
        return Snapshot(path, str(path.absolute()))
    assert reference.repository is not None
    with hub_errors_as(CheckpointError, reference.repository, reference.revision):
        reference = _with_organisation(reference)
        path = _download(reference, part, without)
    location = str(reference.repository)
    if reference.file is None:
        return Snapshot(path, location, path.name)
    return Snapshot(path / reference.file, f"{location}/{reference.file}", path.name)


def _with_organisation(reference: ModelRef) -> ModelRef:
    """A legacy name such as roberta-base as the org/name that the Hub redirects it to.

    Without an answer of the Hub the name stays as it is, under which the cache may know it.
    """
    name = str(reference.repository)
    if "/" in name:
        return reference
    try:
        info = with_retries(lambda: hub_api().model_info(name, revision=reference.revision))
    except Exception as error:
        if not is_unanswered(error):
            raise
        return reference
    return replace(reference, repository=info.id) if is_repository(info.id) else reference


def _download(reference: ModelRef, part: Part, without: Collection[str] = ()) -> Path:
    """The directory of the snapshot in the cache, which then holds all that `part` asks for."""
    repository = str(reference.repository)
    for _ in range(_ATTEMPTS):
        known = _known_files(repository, reference.revision)
        if known is None:  # the cache may hold it; a missing file is reported when it is read
            api = hub_api()
            patterns = [*_REQUIRED]
            return Path(
                api.snapshot_download(repository, revision=reference.revision, allow_patterns=patterns)
            )
        path = _download_files(reference, known, part, without)
        if path is not None:
            return path
    raise CheckpointError(
        f"{repository} changed during each of {_ATTEMPTS} downloads; run the same command again, or name a "
        f"commit: {repository}@COMMIT"
    )


def _download_files(
    reference: ModelRef, listing: Listing, part: Part, without: Collection[str]
) -> Path | None:
    """The directory of the snapshot of a commit; None if the revision is another commit by now."""
    commit = listing.commit
    files = listing.files
    repository = str(reference.repository)
    wanted = [name for name in files if _is_sidecar(name)]
    wanted += [reference.file] if reference.file else _weights(repository, commit, files, part)
    wanted = [name for name in wanted if name not in without]
    if absent := [name for name in wanted if name not in files]:
        raise ModelNotFoundError(f"{repository} has no {absent[0]}; check the name of the file")
    if reference.file is None:
        _refuse_only_folders(repository, files)
    before = {name for name in wanted if files[name] and _cached(repository, commit, name)}
    # Not by the commit: the cache stores which commit a named revision is, for later use without the Hub.
    patterns = [escape(name) for name in wanted]
    missing = {name for name in wanted if not _cached(repository, commit, name)}
    total = sum(listing.sizes[name] for name in missing) if listing.sizes.keys() >= missing else None
    with download_followed(repository, total) as following:
        path = Path(
            with_retries(
                lambda: hub_api().snapshot_download(
                    repository, revision=reference.revision, allow_patterns=patterns, **following
                )
            )
        )
    if path.name != commit:
        return None
    for number, name in enumerate(wanted):
        if (sha256 := files[name]) and name not in before:
            report("check", number, len(wanted), "files", name=name)
            if _sha256(path / name) != sha256:
                _fetch_again(repository, commit, path / name, name, sha256)
    return path


def hashes_of_files(snapshot: Snapshot) -> dict[str, str]:
    """File -> SHA-256 of the files of a Hub model that are stored in LFS; empty if the Hub does not answer.

    Raises CheckpointError if the answer is not the Hub's.
    """
    with hub_errors_as(CheckpointError, snapshot.location, snapshot.revision):
        known = _known_files(snapshot.location, snapshot.revision)
    return {name: sha256 for name, sha256 in known.files.items() if sha256} if known else {}


def _refuse_only_folders(repository: str, files: Collection[str]) -> None:
    """Raise CheckpointError for a repository without a model or adapter in its first folder."""
    if any(name in files for name in _REQUIRED) or any(_in_root(name) for name in files):
        return
    folders = sorted({name.rpartition("/")[0] for name in files if name.endswith(_REQUIRED) and "/" in name})
    if not folders:
        raise CheckpointError(
            f"{repository} holds neither a model nor an adapter ({len(files)} files, none of them weights or "
            "a configuration); check the name"
        )
    one = folders[0]
    raise CheckpointError(
        f"{repository} holds no model in its first folder, but in {', '.join(folders[:4])}: download "
        f'one with `hf download {repository} --include "{one}/*" --local-dir DIR` and give DIR/{one}'
    )


def _in_root(name: str) -> bool:
    """True for weights in the first folder of a repository."""
    return "/" not in name and is_weights(name)


def _known_files(repository: str, revision: str | None) -> Listing | None:
    """The commit of a revision and its files; None if the Hub does not answer.

    Raises CheckpointError if the answer names no commit, or a file outside the repository.
    """
    try:
        info = with_retries(lambda: hub_api().model_info(repository, revision=revision, files_metadata=True))
    except Exception as error:
        if not is_unanswered(error):
            raise
        return None
    if not is_commit(info.sha):
        raise CheckpointError(
            f"{endpoint()} names no commit of {repository}; check HF_ENDPOINT, which may be a mirror without "
            "that feature"
        )
    return Listing(str(info.sha), listed_files(info, repository), listed_sizes(info))


def _is_sidecar(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if fnmatchcase(folder, _MODULES):
        return True
    known = not folder or any(fnmatchcase(folder, pattern) for pattern in _FOLDERS)
    return known and any(fnmatchcase(file, pattern) for pattern in _SIDECARS)


def _weights(repository: str, commit: str, files: Collection[str], part: Part) -> Iterator[str]:
    """The files with weights that `part` includes: adapters, and one storage format of the model's own."""
    if part == "sidecars":
        return
    for name in files:
        folder, _, file = name.rpartition("/")
        here = not folder or fnmatchcase(folder, "*_init")
        pickled = file == _PICKLED_ADAPTER and name.removesuffix(file) + _ADAPTER not in files
        if here and (file in (_ADAPTER, *_OTHER_ADAPTERS) or pickled):
            yield name
    if part == "all":
        yield from _own_weights(repository, commit, files)


def _own_weights(repository: str, commit: str, files: Collection[str]) -> list[str]:
    """The files of the model itself, in the order of preference of `open_checkpoint`."""
    for single, index in ((SINGLE, INDEX), (PICKLED_SINGLE, PICKLED_INDEX)):  # transformers' order
        if single in files:
            return [single]
        if index in files:
            return [name for name in _shards(repository, commit, index) if name in files]
    found = [name for name in files if name.endswith(ENDINGS) and "/" not in name]
    if len(found) > 1:
        raise CheckpointError(
            f"{repository} holds {len(found)} checkpoints; name one of them, as {repository}/{found[0]}"
        )
    return found


def _shards(repository: str, commit: str, index: str) -> list[str]:
    return shard_names(read_index(Path(hub_api().hf_hub_download(repository, index, revision=commit))))


def _cached(repository: str, commit: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, name, revision=commit), str)


def _fetch_again(repository: str, commit: str, path: Path, name: str, sha256: str) -> None:
    """Download a damaged file again. Raises CheckpointError if it is damaged a second time."""
    for attempt in (1, 2):
        path.resolve().unlink()
        path.unlink(missing_ok=True)  # the symbolic link to it
        if attempt == 1:
            hub_api().hf_hub_download(repository, name, revision=commit)
            if _sha256(path) == sha256:
                return
    raise CheckpointError(
        f"{name} of {repository} was damaged in two downloads: its SHA-256 is not the Hub's, {sha256}; "
        "run the same command again, on another network if possible"
    )


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def weight_files(snapshot: Snapshot) -> tuple[list[str], Mapping[str, str] | None]:
    """(safetensors files, tensor -> file or None without an index) of a model whose weights stay on the Hub.

    Raises CheckpointError if its index is damaged.
    """
    index = snapshot.path / INDEX
    if not index.exists() or hub_api().file_exists(snapshot.location, SINGLE, revision=snapshot.revision):
        return [SINGLE], None  # transformers reads a single file that is next to an index
    weight_map = read_index(index)
    return shard_names(weight_map), weight_map
