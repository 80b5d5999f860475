"""Upload a finished directory as one commit of a repository."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from svdconvert.config.display import Shown
from svdconvert.config.execution import ignore_message
from svdconvert.config.options import PushOptions
from svdconvert.errors import HubError
from svdconvert.hub.auth import hub_api, scrub
from svdconvert.hub.errors import hub_errors_as, with_retries
from svdconvert.hub.replies import listed_files
from svdconvert.hub.transfers import Count, upload_followed
from svdconvert.manifest.compared import require_unchanged_files
from svdconvert.manifest.schema import PLAIN, Manifest, read_manifest, training_of
from svdconvert.output.ownership import MANIFEST_NAME
from svdconvert.output.sidecars import CONFIG, read_json_object
from svdconvert.publish.card import CardContext, inherited_entries, is_untouched, write_card
from svdconvert.publish.card_results import own_results, result_files
from svdconvert.publish.files import (
    ADAPTER_CONFIG,
    CARD,
    SourceRepos,
    UploadFiles,
    collect_files,
    resolve_source_repos,
    unnamed_models,
    without_local_paths,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete

_MAIN = "main"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".st", ".gguf")
_SETTINGS = ".gitattributes"
_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The repository that a directory is pushed to."""

    repository: str
    options: PushOptions = field(default_factory=PushOptions)
    base: str | None = None
    """The base's org/name, if it was read from a local directory."""
    residual: str | None = None
    """The residual base's org/name, if it was read from a local directory."""

    @property
    def branch(self) -> str:
        """The branch that is written, or that a pull request is for."""
        return self.options.revision or _MAIN


@dataclass(frozen=True, repr=False)
class Published(Shown):
    """The result of a push."""

    url: str
    """The address of the commit, or of the pull request."""
    commit: str
    files: int
    nbytes: int
    unsent: list[str]
    """Files of the directory that were not sent."""
    changed: bool
    """False if the repository held all of it already."""
    lacks_base: bool = False
    """True for an adapter whose card cannot name the model that it is loaded on, because that is local."""

    def shown_as(self) -> Mapping[str, object]:
        """The address, and what was sent."""
        return {
            "url": self.url,
            "commit": self.commit,
            "files": self.files,
            "bytes": self.nbytes,
            "changed": self.changed,
            "not sent": len(self.unsent) or None,
        }


@dataclass(frozen=True)
class BranchState:
    """A branch as it is before a push."""

    commit: str
    files: frozenset[str]
    own: frozenset[str]
    """The files with tensors that svdconvert uploaded earlier."""
    card: str | None
    """A model card that a user wrote or edited; None for one of ours, or none."""


def check_destination(destination: Destination) -> None:
    """Refuse a destination that cannot be pushed to, before any work is done. Changes nothing.

    Raises HubError if nobody is logged in, the token may only read, or the repository holds what
    svdconvert did not write.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with hub_errors_as(HubError, destination.repository):
        role = with_retries(hub_api().whoami).get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise HubError("the token may only read; log in with one that may write")
        try:
            inspect_branch(destination)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return  # they are created when the work is done


def upload(
    directory: Path, destination: Destination, notify: Callable[[str], None] = ignore_message
) -> Published:
    """Upload a finished directory as one commit; files that the Hub has are not uploaded again.

    Calls `notify` with a sentence for each model that the card cannot name. Raises ArtifactError if a tensor
    has changed since it was written, else HubError with one sentence; the same push can be repeated.
    """
    manifest = read_manifest(directory)
    require_unchanged_files(directory, manifest)
    with hub_errors_as(HubError, destination.repository, destination.options.revision):
        repos = resolve_source_repos(manifest, destination.base, destination.residual)
        open_repository(destination)
        for sentence in unnamed_models(manifest, repos):
            notify(sentence)
        return commit_directory(directory, manifest, destination, repos)


@dataclass(frozen=True, kw_only=True)
class PushEstimate:
    """What a push would send. Sizes in bytes."""

    repository: str
    branch: str
    files: Mapping[str, int]
    """Path in the repository -> size. The Hub may have some of them already."""
    nbytes: int
    unsent: tuple[str, ...]
    """Files of the directory that are not sent."""
    base: str | None
    """org/name of the base that the card names."""
    residual: str | None
    lacks_base: bool
    """True for an adapter whose card cannot name the model that it is loaded on, because that is local."""
    private: bool
    pull_request: bool
    message: str | None


def estimate_push(directory: Path, destination: Destination) -> PushEstimate:
    """What `upload` would send, in addition to a card. Asks the Hub for `base` and `residual` only.

    Raises SvdConvertError as `upload` does, except for what the Hub refuses.
    """
    manifest = read_manifest(directory)
    repos = resolve_source_repos(manifest, destination.base, destination.residual)
    manifest = without_local_paths(manifest, repos)
    collected = collect_files(directory, manifest, destination.repository, repos)
    files = {**collected.files, **result_files(own_results(directory, manifest))}
    sizes = {
        name: content.stat().st_size if isinstance(content, Path) else len(content)
        for name, content in sorted(files.items())
    }
    return PushEstimate(
        repository=destination.repository,
        branch=destination.branch,
        files=sizes,
        nbytes=sum(sizes.values()),
        unsent=tuple(name for name in collected.unsent if name not in files),
        base=repos.base_id,
        residual=repos.residual_id,
        lacks_base=_lacks_base(manifest, repos),
        private=destination.options.private,
        pull_request=destination.options.pull_request,
        message=destination.options.message,
    )


def open_repository(destination: Destination) -> None:
    """Create the repository and the branch if they do not exist."""
    name = destination.repository
    branch = destination.branch
    private = destination.options.private or None
    with_retries(lambda: hub_api().create_repo(name, private=private, exist_ok=True))
    if branch != _MAIN and not destination.options.pull_request:
        with_retries(lambda: hub_api().create_branch(name, branch=branch, exist_ok=True))


def commit_directory(
    directory: Path,
    manifest: Manifest,
    destination: Destination,
    repos: SourceRepos,
    copies: Mapping[str, str] = MappingProxyType({}),
) -> Published:
    """Commit all of `directory` at once. `copies` are uploaded already: file -> its branch."""
    manifest = without_local_paths(manifest, repos)
    upload_files = collect_files(directory, manifest, destination.repository, repos)
    state = inspect_branch(destination)
    files = {**upload_files.files, **result_files(own_results(directory, manifest))}
    if state.card is None:
        files.setdefault(CARD, _card(directory, manifest, destination, repos).encode())
    upload_files = UploadFiles(files, [name for name in upload_files.unsent if name not in files])
    made = _commit(upload_files, copies, state, destination)
    return Published(
        url=scrub(made.pr_url or made.commit_url),
        commit=made.oid,
        files=len(files) + len(copies),
        nbytes=upload_files.nbytes,
        unsent=upload_files.unsent,
        changed=made.oid != state.commit,
        lacks_base=_lacks_base(manifest, repos),
    )


def _lacks_base(manifest: Manifest, repos: SourceRepos) -> bool:
    if manifest.kind == "trained" and manifest.base_is_residual:
        return repos.residual_id is None
    needs_base = manifest.kind in ("trained", "lora") or not (manifest.kind in PLAIN or manifest.checksums)
    return needs_base and repos.base_id is None


def _commit(
    upload_files: UploadFiles, copies: Mapping[str, str], state: BranchState, destination: Destination
) -> "CommitInfo":
    """Commit on top of the inspected state, so that a commit made in the meantime is never overwritten."""
    options = destination.options
    name = destination.repository
    wanted = {*upload_files.files, *copies}

    def attempt(count: Count) -> "CommitInfo":
        # Anew each time: an attempt whose answer was lost may have been carried out.
        return hub_api().create_commit(
            name,
            operations=[
                count(operation)
                for operation in _operations(upload_files, copies, inspect_branch(destination).own - wanted)
            ],
            commit_message=options.message or f"Upload {name.split('/')[-1]} with svdconvert",
            revision=destination.branch,
            parent_commit=state.commit,
            create_pr=options.pull_request,
        )

    with upload_followed(name, upload_files.nbytes) as count:
        return attempt(count) if options.pull_request else with_retries(lambda: attempt(count))


def _operations(
    upload_files: UploadFiles, copies: Mapping[str, str], stale: frozenset[str]
) -> "list[Operation]":
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    adds = [CommitOperationAdd(path, content) for path, content in upload_files.files.items()]
    moved = [CommitOperationCopy(path, path, src_revision=branch) for path, branch in copies.items()]
    return [*adds, *moved, *(CommitOperationDelete(path) for path in sorted(stale))]


def inspect_branch(destination: Destination) -> BranchState:
    """The state of the branch. Raises HubError if it holds weights that svdconvert did not upload."""
    name = destination.repository
    branch = destination.branch
    info = with_retries(lambda: hub_api().model_info(name, revision=branch))
    assert info.sha is not None
    files = frozenset(listed_files(info, name))
    own = frozenset[str]()
    if MANIFEST_NAME in files:
        manifest = read_json_object(_download(name, MANIFEST_NAME, info.sha))
        listed = manifest.get("files")
        own = frozenset(listed if isinstance(listed, dict) else ()) & files
    others = sorted(path for path in files - own if path.endswith(_WEIGHTS))
    if others and not destination.options.pull_request:
        raise HubError(
            f"{name} holds {others[0]}, which svdconvert did not write ({len(others)} such files); choose "
            "another name, or propose it with --pull-request"
        )
    card = _text(_download(name, CARD, info.sha)) if CARD in files else None
    return BranchState(info.sha, files, own, None if card is None or is_untouched(card) else card)


def _card(directory: Path, manifest: Manifest, destination: Destination, repos: SourceRepos) -> str:
    homes = sorted({Path(name).parent for name in manifest.files})
    config = _json_of(directory / CONFIG)
    context = CardContext(
        repository=destination.repository,
        revision=destination.options.revision,
        repos=repos,
        config=config,
        adapter=next(filter(None, (_json_of(directory / home / ADAPTER_CONFIG) for home in homes)), {}),
        inherited=_inherited(repos),
        training=training_of(directory, manifest),
        results=list(own_results(directory, manifest).values()),
        has_tokenizer=(directory / _TOKENIZER).exists(),
        absent=tuple(file for file in _code_files(config) if not (directory / file).exists()),
    )
    return write_card(manifest, context)


def _code_files(config: Mapping[str, Any]) -> list[str]:
    """The files of code that a configuration names."""
    classes = config.get("auto_map")
    names = classes.values() if isinstance(classes, dict) else ()
    named = (name.split(".")[0] for name in names if isinstance(name, str))
    return sorted({f"{module}.py" for module in named if "--" not in module})


def _json_of(path: Path) -> Mapping[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _inherited(repos: SourceRepos) -> Mapping[str, Any]:
    """The base's licence and language, from its card if there is one."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if repos.base is None:
        return {}
    try:
        local = Path(repos.base.location) / CARD
        card = _download(repos.base_id, CARD, repos.base.revision) if repos.base_id else local
        return inherited_entries(_text(card))
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return {}  # a base without a card, or one that cannot be read now


def _text(card: Path) -> str:
    """The text of a model card, which anybody may have written in any encoding."""
    return card.read_text(encoding="utf-8", errors="replace")


def _download(repository: str, file: str, commit: str | None) -> Path:
    return Path(with_retries(lambda: hub_api().hf_hub_download(repository, file, revision=commit)))
