"""The files of a staging directory that have left it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.config.shard_sink import ShardSink
from svdconvert.output.journal import Journal, Record, read_journal
from svdconvert.output.plan import PlannedFile

SENT = "sent.jsonl"


class ShardUploads:
    """Sends finished shards off, and remembers which."""

    def __init__(
        self,
        directory: Path,
        files: Sequence[PlannedFile],
        identity: Mapping[str, Any],
        shard_sink: ShardSink,
    ) -> None:
        self._directory, self._identity, self._sink = directory, identity, shard_sink
        self._names = {file.path: {info.name for info in file.infos} for file in files}
        self._journal: Journal | None = None

    def leaves(self, file: str) -> bool:
        """True for the shards; an adapter grows until the end, and a .pth is sealed then."""
        return "/" not in file and file.endswith(".safetensors")

    def known(self, finished: Mapping[str, Record]) -> set[str]:
        """The files that an earlier run sent, whose tensors are all noted as finished."""
        self._sink.begin(self._identity)
        noted: dict[str, set[str]] = {}
        for record in finished.values():
            for file, marks in record.get("files", {}).items():
                noted.setdefault(file, set()).update(marks)
        sent = read_journal(self._directory / SENT)[1]
        return {
            file
            for file, record in sent.items()
            if noted.get(file) == self._names.get(file) and self._sink.holds(file, record)
        }

    def open(self, *, anew: bool) -> None:
        """Begin to remember; `anew` forgets what was sent before."""
        self._journal = Journal(self._directory / SENT, self._identity, anew=anew)

    def send(self, file: str) -> None:
        """Send a finished file and delete it."""
        assert self._journal is not None
        path = self._directory / file
        self._journal.finish(file, dict(self._sink.send(path, file)))
        path.unlink()

    def finish(self) -> None:
        """Send the rest."""
        self._sink.finish(self._directory)

    def close(self) -> None:
        """Let go of the journal."""
        if self._journal is not None:
            self._journal.close()
