"""The interface for uploading finished files at once, so that they need not all fit on this disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class ShardSink(Protocol):
    """Takes the files of one output."""

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Prepare for the run with this identity, which its continuation has too."""
        ...

    def send(self, path: Path, file: str) -> Mapping[str, Any]:
        """Upload a finished file, which may then be deleted; a record by which `holds` recognises it."""
        ...

    def holds(self, file: str, record: Mapping[str, Any]) -> bool:
        """True if the sink still has a file that an earlier run sent."""
        ...

    def finish(self, directory: Path) -> None:
        """Upload all files that are left in `directory` and make everything visible at once."""
        ...
