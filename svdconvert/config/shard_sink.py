"""Finished files that go elsewhere at once, so that they need not all lie on this disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class ShardSink(Protocol):
    """Where the files of one output go."""

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Prepare the place for the run of this identity: the same for the same run, begun before or not."""
        ...

    def send(self, path: Path, file: str) -> Mapping[str, Any]:
        """Send a finished file; what to recognise it by. When this returns, the file may be deleted."""
        ...

    def holds(self, file: str, record: Mapping[str, Any]) -> bool:
        """True where a file that was sent before is still there."""
        ...

    def finish(self, directory: Path) -> None:
        """Send all that is still here and make everything visible at once."""
        ...
