"""What a user writes for a model: a path, or org/name[@revision]."""

import re
from dataclasses import dataclass
from pathlib import Path

from svdconvert.errors import CheckpointError

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A local directory, or a repository of the Hub at a revision."""

    path: Path | None
    repository: str | None = None
    revision: str | None = None

    @staticmethod
    def parse(text: str) -> "ModelRef":
        """A path where one exists, else a repository. Raises CheckpointError where it can be neither."""
        if Path(text).exists():
            return ModelRef(Path(text))
        name, _, revision = text.partition("@")
        if _REPOSITORY.fullmatch(name):
            return ModelRef(None, name, revision or None)
        raise CheckpointError(
            f"{text} does not exist, and is no org/name[@revision] of the Hub; check the path"
        )
