"""What a user types for a model: a path, org/name[@revision], or one file of a repository."""

import re
from dataclasses import dataclass
from pathlib import Path

from svdconvert.checkpoint.safetensors_files import ENDINGS
from svdconvert.errors import ModelNotFoundError

_FILE = "|".join(re.escape(ending) for ending in ENDINGS)
_REPOSITORY = re.compile(rf"(?P<name>\w[\w.-]*/[\w.-]+)(/(?P<file>[^@]+({_FILE})))?(@(?P<revision>.+))?")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A local directory or file, or a repository of the Hub at a revision."""

    path: Path | None
    repository: str | None = None
    revision: str | None = None
    file: str | None = None
    """The file of the repository that is the model; None if the model is the repository."""

    @staticmethod
    def parse(text: str) -> "ModelRef":
        """A path if one exists, else a repository. Raises ModelNotFoundError if it can be neither."""
        if Path(text).exists():
            return ModelRef(Path(text))
        if match := _REPOSITORY.fullmatch(text):
            return ModelRef(None, match["name"], match["revision"] or None, match["file"])
        raise ModelNotFoundError(
            f"{text} does not exist and is not an org/name[@revision] of the Hub; check the path"
        )
