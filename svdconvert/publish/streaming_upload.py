"""Upload what does not fit on this disk: every shard is sent as soon as it is finished.

They are committed to a work branch, which is named after the run. At the end one commit on the branch
that was asked for takes them over, on the Hub's own side, together with everything else; then the work
branch goes. Until then nobody sees a change, and an interrupted run finds its shards again.
"""

import json
from collections.abc import Callable, Mapping
from contextvars import Context, copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from svdconvert.config.execution import ignore_message
from svdconvert.errors import HubError
from svdconvert.hub.auth import hub_api
from svdconvert.hub.errors import hub_errors_as, with_retries
from svdconvert.hub.transfers import upload_followed
from svdconvert.manifest.schema import read_manifest
from svdconvert.publish.files import resolve_source_repos, unnamed_models
from svdconvert.publish.upload import Destination, Published, commit_directory, open_repository


class StreamingUpload:
    """A ShardSink that uploads to a repository of the Hub."""

    def __init__(self, destination: Destination, notify: Callable[[str], None] = ignore_message) -> None:
        self._destination = destination
        self._say = notify
        self._branch = ""
        self._context = Context()
        self._sent: dict[str, int] = {}
        self.published: Published | None = None
        """The result, once `finish` has run."""

    def __str__(self) -> str:
        return self._destination.repository

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Create the repository and the work branch. Raises HubError if that is not allowed."""
        self._context = copy_context()
        name = self._destination.repository
        text = json.dumps(identity, sort_keys=True)
        self._branch = f"svdconvert-{xxhash.xxh3_64_hexdigest(text.encode())}"
        with hub_errors_as(HubError, name, self._branch):
            open_repository(self._destination)
            with_retries(lambda: hub_api().create_branch(name, branch=self._branch, exist_ok=True))

    def send(self, path: Path, file: str) -> Mapping[str, Any]:
        """Commit a finished shard to the work branch; its size and SHA-256 as the Hub states them.

        Called from the thread that writes, which has no context of its own to report progress in.
        """
        return self._context.run(self._send, path, file)

    def _send(self, path: Path, file: str) -> Mapping[str, Any]:
        from huggingface_hub import CommitOperationAdd

        name = self._destination.repository
        nbytes = path.stat().st_size
        with hub_errors_as(HubError, name, self._branch), upload_followed(file, nbytes) as count:
            with_retries(
                lambda: hub_api().create_commit(
                    name,
                    operations=[count(CommitOperationAdd(file, path))],
                    commit_message=f"Keep {file} until all is finished",
                    revision=self._branch,
                )
            )
        record = self._stored(file)
        if record is None or record["size"] != nbytes:
            raise HubError(f"{name} does not hold {file} as it was sent; run the same command again to go on")
        self._sent[file] = nbytes
        return record

    def holds(self, file: str, record: Mapping[str, Any]) -> bool:
        """True if the work branch has the file, byte for byte."""
        if self._stored(file) != record:
            return False
        self._sent[file] = int(record["size"])
        return True

    def finish(self, directory: Path) -> None:
        """Commit everything at once, and delete the work branch."""
        destination = self._destination
        with hub_errors_as(HubError, destination.repository, destination.options.revision):
            copies = dict.fromkeys(self._sent, self._branch)
            manifest = read_manifest(directory)
            repos = resolve_source_repos(manifest, destination.base, destination.residual)
            for sentence in unnamed_models(manifest, repos):
                self._say(sentence)
            done = commit_directory(directory, manifest, destination, repos, copies)
            self.published = replace(done, nbytes=done.nbytes + sum(self._sent.values()))
            try:
                hub_api().delete_branch(destination.repository, branch=self._branch)
            except Exception:  # what was asked for is done
                self._say(f"the work branch {self._branch} of {destination.repository} is left; delete it")

    def _stored(self, file: str) -> Mapping[str, Any] | None:
        """Size and SHA-256 of a file on the work branch."""
        from huggingface_hub.hf_api import RepoFile

        name = self._destination.repository
        with hub_errors_as(HubError, name, self._branch):
            found = with_retries(lambda: hub_api().get_paths_info(name, [file], revision=self._branch))
        large = [entry.lfs for entry in found if isinstance(entry, RepoFile) and entry.lfs]
        return {"size": large[0].size, "sha256": large[0].sha256} if large else None
