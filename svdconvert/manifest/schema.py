"""The manifest, svdconvert.json: what a directory contains, what it was made from, and how exact it is.

It is written last, so its presence means that the directory is complete. docs/manifest.md describes the
schema.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from svdconvert.checkpoint.file_names import is_known_kind, leads_outside, name_fault
from svdconvert.config.display import Shown
from svdconvert.errors import ArtifactError
from svdconvert.manifest import format1
from svdconvert.manifest.fingerprint import Fingerprint, file_checksum
from svdconvert.manifest.place import Place
from svdconvert.manifest.results import RESULT_OF_KIND, Result
from svdconvert.manifest.training import Training, recorded_training
from svdconvert.output.journal import journals
from svdconvert.output.ownership import MANIFEST_NAME
from svdconvert.output.plan import FileRole, PlannedFile
from svdconvert.output.shard_uploads import UPLOADS
from svdconvert.output.sidecars import read_json_object
from svdconvert.version import __version__

FORMAT = 2
Kind = Literal["decomposed", "trained", "finetuned", "merged", "lora", "converted"]
PLAIN = ("finetuned", "merged", "converted")
"""The kinds that are plain checkpoints, which other programs can load."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The model that a directory was made from, or belongs to."""

    location: str
    """An absolute path, or org/name on the Hub."""
    revision: str | None = None
    """The commit, for a model of the Hub."""
    fingerprint: Fingerprint


QuantStart = Literal["pissa", "loftq"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantisedMatrix:
    """How the residual Q of one matrix is quantised, and how much less it loses than plain NF4."""

    format: Literal["nf4", "fp4"]
    double: bool
    """True if the scales are quantised too."""
    start: QuantStart | None
    """Whether the better result began with the method's factors (pissa) or without factors (loftq); None if
    the factors' product is zero."""
    iteration: int
    """After which iteration it was reached; 0 if the factors were not fitted."""
    reduction: float
    """1 - ||W - (Q + scale * B A)||_F / ||W - NF4(W)||_F, NF4 in blocks of 64 without double quantisation."""
    checksum: str
    """Of Q as it is read: decoded, in the dtype of config.json."""
    nuclear_reduction: float | None = None
    """The same in the nuclear norm, the error ratio of PiSSA's section 4; None if it was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """One adapted matrix: names, shape and measurements. A measurement that does not apply is None."""

    module: str
    role: str
    shape: tuple[int, int]
    """(out features, in features)."""
    dtype: str
    """Element type in the base."""
    rank: int
    scale: float
    """The scale of the initial adapter: W = W_res + scale * B A."""
    sigma_first: float | None = None
    sigma_last: float | None = None
    energy: float | None = None
    """Share of ||W||_F^2 in the factors."""
    excess: float | None = None
    """Estimated excess of the residual's norm over the optimum; 0 if the SVD is exact."""
    engine: str | None = None
    error: float = 0.0
    """||W_res + scale * B A - W||_F / ||W||_F as stored."""
    place: Place | None = None
    """Which part of which parameter it is at run time; None if it is the weight of `module`."""
    quantised: QuantisedMatrix | None = None
    """None if the residual is stored in plain numbers."""

    @staticmethod
    def of(note: Mapping[str, Any]) -> "Matrix":
        """The inverse of `asdict`; the place stays as JSON has it."""
        found = note.get("quantised")
        return Matrix(**{**note, "quantised": QuantisedMatrix(**found) if found else None})


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Manifest(Shown):
    """The content of svdconvert.json."""

    kind: Kind
    layout: str
    method: str
    base: Origin | None
    residual: Origin | None = None
    """The residual base; None if the method leaves the base unchanged."""
    base_is_residual: bool = False
    """True if the adapter belongs to a residual W - scale * B A, False if it belongs to the base itself."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Every option that affects the result, as requested, defaults included."""
    result: Result | None = None
    """What resulted from the options; None for kinds without such a result."""
    training: Training | None = None
    """The training that the weights come from; None if there was none, or if nothing is known of it."""
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    """By the tensor's name in the base."""
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Checksum of every stored tensor, by file."""
    roles: Mapping[str, FileRole] = field(default_factory=dict)
    """Role of every file of tensors."""
    sidecars: Mapping[str, str] = field(default_factory=dict)
    """Checksum of every other file: configuration, tokenizer, metrics."""
    threads: int = 0
    command: str | None = None
    """The command that wrote the directory, if that is not the usual one of its kind: extract."""
    svdconvert: str = __version__
    format: int = FORMAT

    def shown_as(self) -> Mapping[str, object]:
        """Kind, method, ranks, base, and the measurements of all matrices together."""
        ranks = sorted({matrix.rank for matrix in self.matrices.values()})
        energies = [matrix.energy for matrix in self.matrices.values() if matrix.energy is not None]
        held_out = self.training.held_out if self.training else ()
        return {
            "kind": self.kind,
            "method": self.method or None,
            "layout": self.layout or None,
            "rank": ranks[0] if len(ranks) == 1 else ranks or getattr(self.result, "rank", None),
            "matrices": len(self.matrices) or None,
            "base": self.base.location if self.base else None,
            "mean energy": round(sum(energies) / len(energies), 4) if energies else None,
            "held-out loss": held_out[-1][1] if held_out else None,
            "files": len(self.files),
        }

    def write(self, directory: Path) -> "Manifest":
        """Write svdconvert.json into `directory`. Raises ArtifactError if a value is NaN or infinite."""
        try:
            text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        except ValueError as error:
            raise ArtifactError(
                f"{directory} has no valid manifest: a measured value is NaN or infinite; check that "
                "the input weights are finite"
            ) from error
        # In JSON, the escape of a byte of a path that is no UTF-8 is what backslashreplace writes.
        (directory / MANIFEST_NAME).write_bytes(text.encode("utf-8", "backslashreplace"))
        return self

    def files_of(self, role: FileRole) -> list[str]:
        """The files with this role, in the manifest's order."""
        return [file for file in self.files if self._role(file) == role]

    @property
    def checksums(self) -> dict[str, str]:
        """Checksum of every tensor of the model's own weights, by name; of a 4-bit one as it is read."""
        found = {
            name: checksum for file in self.files_of("model") for name, checksum in self.files[file].items()
        }
        for name, matrix in self.matrices.items():
            if matrix.quantised and name in found:
                found = {key: value for key, value in found.items() if not key.startswith(f"{name}.")}
                found[name] = matrix.quantised.checksum
        return found

    @property
    def init_directory(self) -> str:
        """The subdirectory of the initial adapter; empty if there is none."""
        return next((file.rpartition("/")[0] for file in self.files_of("initial_adapter")), "")

    @property
    def head(self) -> Mapping[str, Any] | None:
        """The entries of config.json that describe a head trained with the adapter."""
        return None if self.result is None else self.result.head

    def _role(self, file: str) -> FileRole:
        return self.roles.get(file) or _inferred_role(self.kind, file)


def _inferred_role(kind: Kind, file: str) -> FileRole:
    """The role of a file that has none in the manifest, as in format 1."""
    if "/" in file:
        return "initial_adapter"
    return "adapter" if kind in ("trained", "lora") else "model"


def sidecar_checksums(directory: Path, files: Sequence[PlannedFile]) -> dict[str, str]:
    """Checksum of every file below `directory` except planned files and those of the staging itself."""
    planned = {file.path for file in files} | {MANIFEST_NAME, UPLOADS}
    planned |= {path.name for path in journals(directory)}
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: file_checksum(path) for name, path in sorted(found.items()) if name not in planned}


def roles_of(files: Sequence[PlannedFile]) -> dict[str, FileRole]:
    """The role of every planned file, for the manifest."""
    return {file.path: file.role for file in files if not file.temporary}


def run_identity(verb: str, options: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Everything that could change the output's bytes: a run is only continued if it is the same."""
    import torch

    return {
        "verb": verb,
        "svdconvert": __version__,
        "torch": torch.__version__,
        "options": dict(options),
        "threads": threads,
    }


def has_manifest(directory: Path) -> bool:
    """True if `directory` is a complete directory that svdconvert wrote."""
    return (directory / MANIFEST_NAME).is_file()


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a directory.

    Raises ArtifactError if it is missing, damaged or of an unknown format, or if it lists a file that is
    outside the directory, is hidden, or is not of a kind that belongs to a model.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    if not path.is_file():
        if not directory.is_dir():
            what = "is a file" if directory.exists() else "does not exist"
            raise ArtifactError(f"{directory} {what}; give a directory that svdconvert wrote")
        if directory.name.endswith(".partial"):
            raise ArtifactError(
                f"{directory} was left by an unfinished run; repeat that command to finish it"
            )
        raise ArtifactError(f"{directory} was not written by svdconvert: it holds no {MANIFEST_NAME}")
    values = read_json_object(path)
    if values.get("format") == format1.FORMAT:
        values = format1.upgraded(values)
    if values.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {values.get('format')!r}, and this svdconvert reads formats 1 to {FORMAT}; "
            "use the version that wrote it"
        )
    if absent := [name for name in _REQUIRED if name not in values]:
        raise ArtifactError(f"{path} is damaged at {absent[0]}, which is missing; restore the file")
    known = {entry.name for entry in fields(Manifest)}
    values = {name: value for name, value in values.items() if name in known}
    try:
        result = _read_result(values)
        manifest = _reader().validate_python(values | {"result": result})
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is damaged at {location}: {first['msg']}; restore the file") from error
    _refuse_names(path, manifest)
    return manifest


def training_of(directory: Path, manifest: Manifest | None) -> Training | None:
    """The training that a directory comes from, as its manifest or, from before 0.2, its measurements say.

    None if there was none. Raises ArtifactError if the measurements are damaged.
    """
    if manifest is None or manifest.training is not None:
        return manifest.training if manifest else None
    if manifest.kind not in ("trained", "finetuned"):
        return None
    ranks = [matrix.rank for matrix in manifest.matrices.values()]
    return recorded_training(directory, manifest.options, max(ranks, default=None))


def _refuse_names(path: Path, manifest: Manifest) -> None:
    """Raise ArtifactError if the manifest names a file that must not be read or published with it."""
    if manifest.method and ("/" in manifest.method or name_fault(manifest.method)):
        raise ArtifactError(
            f"{path} is damaged at method: {manifest.method!r} is not a method's name; restore the file"
        )
    for name in (*manifest.files, *manifest.roles, *manifest.sidecars):
        fault = name_fault(name)
        if fault is None and name not in manifest.sidecars and not is_known_kind(name):
            fault = "is neither weights nor a file that belongs to a model"
        file = path.parent / name
        if fault is None and file.exists() and leads_outside(file, path.parent):
            fault = "is a symbolic link that ends outside the directory"
        if fault:
            raise ArtifactError(
                f"{path} names {name!r}, which {fault}; restore the manifest, or get the directory from a "
                "source that you trust"
            )


_REQUIRED = ("kind", "layout", "method", "base", "residual", "options", "matrices", "files", "threads")


def _read_result(values: Mapping[str, Any]) -> Result | None:
    kind = RESULT_OF_KIND.get(str(values.get("kind")))
    if kind is None:
        return None
    result: Result = TypeAdapter(kind).validate_python(values.get("result") or {})
    return result


@cache
def _reader() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)
