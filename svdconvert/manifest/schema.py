"""svdconvert.json: what a directory is, where it came from, and how exact it is.

Written last, so that its presence means the directory is complete. The schema is described in
docs/manifest.md.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from svdconvert.errors import ArtifactError
from svdconvert.manifest.fingerprint import Fingerprint
from svdconvert.output.sidecars import read_json_object
from svdconvert.output.staging import MANIFEST_NAME

FORMAT = 1
Kind = Literal["decomposed", "trained", "merged", "lora", "converted"]
PLAIN = ("merged", "converted")
"""The kinds that are plain checkpoints, like one from elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A model that a directory belongs to."""

    location: str
    """An absolute path, or org/name on the Hub."""
    revision: str | None = None
    """The commit, for a model of the Hub."""
    fingerprint: Fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """One adapted matrix: names, shape and measured errors. None where it does not apply."""

    module: str
    role: str
    shape: tuple[int, int]
    dtype: str
    """Element type in the base."""
    rank: int
    scale: float
    """Of the initial adapter: W = W_res + scale * B A."""
    sigma_first: float | None = None
    sigma_last: float | None = None
    energy: float | None = None
    """Share of ||W||_F^2 in the factors."""
    excess: float | None = None
    """Estimated excess of the residual's norm over the optimum; 0 where the SVD is exact."""
    engine: str | None = None
    error: float = 0.0
    """||W_res + scale * B A - W||_F / ||W||_F as stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of svdconvert.json."""

    kind: Kind
    layout: str
    method: str
    base: Origin | None
    residual: Origin | None = None
    """The residual base: absent where the method leaves the base as it is."""
    rebased: bool = False
    """True where the adapter belongs to a residual, W - scale * B A; False where to the base itself."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Every option that shaped the result."""
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    """By the tensor's name in the base."""
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Checksum of every stored tensor, by file."""
    threads: int = 0
    svdconvert: str = field(default_factory=lambda: version("svdconvert"))
    format: int = FORMAT

    def write(self, directory: Path) -> "Manifest":
        """Write svdconvert.json into `directory`."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")
        return self

    @property
    def checksums(self) -> dict[str, str]:
        """Checksum of every stored tensor of the model's own files, whatever the file."""
        return {
            name: mark
            for file, marks in self.files.items()
            if "/" not in file
            for name, mark in marks.items()
        }


def head_of(manifest: Manifest | None) -> dict[str, Any]:
    """{"head": what config.json says of a head that was trained on top}, or nothing."""
    head = manifest.options.get("head") if manifest else None
    return {"head": head} if head else {}


def run_identity(verb: str, options: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What must be the same when an interrupted run goes on: anything that could change its bytes."""
    import torch

    return {
        "verb": verb,
        "svdconvert": version("svdconvert"),
        "torch": torch.__version__,
        "options": dict(options),
        "threads": threads,
    }


def has_manifest(directory: Path) -> bool:
    """True where a complete directory of svdconvert stands."""
    return (directory / MANIFEST_NAME).is_file()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory. Raises ArtifactError where it is missing or of another format."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        if not directory.is_dir():
            what = "is a file" if directory.exists() else "does not exist"
            raise ArtifactError(f"{directory} {what}; give a directory that svdconvert wrote")
        if directory.name.endswith(".partial"):
            raise ArtifactError(
                f"{directory} is what an unfinished run left; repeat that command to finish it"
            )
        raise ArtifactError(f"{directory} was not written by svdconvert: it holds no {MANIFEST_NAME}")
    values = read_json_object(path)
    if values.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {values.get('format')!r} and this svdconvert reads {FORMAT}; "
            "use the version that wrote it"
        )
    if absent := [entry.name for entry in fields(Manifest) if entry.name not in values]:
        raise ArtifactError(f"{path} is damaged at {absent[0]}, which is missing; restore the file")
    try:
        return _reader().validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is damaged at {place}: {first['msg']}; restore the file") from error


@cache
def _reader() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)
