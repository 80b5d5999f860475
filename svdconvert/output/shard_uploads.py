"""The shards of a staging directory that are uploaded, and deleted there, as soon as they are finished."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.config.shard_sink import ShardSink
from svdconvert.output.journal import Journal, Record, read_journal
from svdconvert.output.plan import PlannedFile

UPLOADS = "sent.jsonl"
"""The journal of what is uploaded."""


class ShardUploads:
    """Uploads finished shards and keeps a journal of them."""

    def __init__(
        self,
        directory: Path,
        files: Sequence[PlannedFile],
        identity: Mapping[str, Any],
        shard_sink: ShardSink,
    ) -> None:
        self._directory = directory
        self._identity = identity
        self._sink = shard_sink
        self._files = {file.path: file for file in files}
        self._journal: Journal | None = None

    def is_uploaded_early(self, file: str) -> bool:
        """True for a shard of the model; an adapter and a .pth are complete only at the end of the run."""
        return self._files[file].role == "model" and file.endswith(".safetensors")

    def find_uploaded(self, finished: Mapping[str, Record]) -> set[str]:
        """Prepare the sink; the files that an earlier run uploaded and that need not be written again.

        The sink still holds each of them, and all their tensors are in `finished`. Raises HubError if the
        sink refuses the run.
        """
        self._sink.begin(self._identity)
        written: dict[str, set[str]] = {}
        for record in finished.values():
            for file, checksums in record.get("files", {}).items():
                written.setdefault(file, set()).update(checksums)
        planned = {path: {info.name for info in file.units} for path, file in self._files.items()}
        uploaded = read_journal(self._directory / UPLOADS)[1]
        return {
            file
            for file, record in uploaded.items()
            if written.get(file) == planned.get(file) and self._sink.holds(file, record)
        }

    def open(self, *, discard: bool) -> None:
        """Open the journal; `discard` removes what an earlier run wrote into it."""
        self._journal = Journal(self._directory / UPLOADS, self._identity, discard=discard)

    def upload(self, file: str) -> None:
        """Upload a finished file, note it in the journal and delete it here."""
        assert self._journal is not None
        path = self._directory / file
        self._journal.finish(file, dict(self._sink.send(path, file)))
        path.unlink()

    def finish(self) -> None:
        """Upload what is left in the directory and make everything visible."""
        self._sink.finish(self._directory)

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()
