"""One tensor after the other from a source into a staged output: the whole scheduler."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from svdconvert.artifact.fingerprint import CHUNK, Checksum, checksum
from svdconvert.checkpoint.source import TensorSource, tensor_bytes
from svdconvert.checkpoint.writer import StagedOutput
from svdconvert.errors import ArtifactError
from svdconvert.progress import Progress, Track

Place = tuple[str, str]
"""(file, name) of an output tensor."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one matrix."""

    tensors: Mapping[Place, Tensor]
    note: Mapping[str, Any] = field(default_factory=dict)
    """For the manifest."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done with each tensor of a source."""

    order: Iterable[str]
    """Names, in the order of the output's shards."""
    matrices: Mapping[str, Any]
    """The names that are computed; all others are copied."""
    compute: Callable[[str, Tensor], Outcome]
    """(name, tensor as stored) -> outcome."""
    copies: Mapping[str, str]
    """Name -> file of the output, for what is copied; what is in neither is only noted."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """Checksums that the source must have."""
    origin: str = ""
    """What to call the source in a complaint."""


def stream(work: Work, source: TensorSource, staged: StagedOutput, track: Track) -> None:
    """Do the work, from where an earlier run left it. Notes go into the journal of `staged`."""
    order = list(work.order)
    total = sum(source.infos[name].nbytes for name in order)
    done = 0
    for name in order:
        if name not in staged.finished:
            staged.finish(
                name,
                _matrix(work, name, source, staged)
                if name in work.matrices
                else _copy(work, name, source, staged),
            )
        done += source.infos[name].nbytes
        track(Progress(name, work.copies.get(name, ""), done, total))


def _matrix(work: Work, name: str, source: TensorSource, staged: StagedOutput) -> dict[str, Any]:
    tensor = source.read(name)
    mark = _checked(work, name, checksum(tensor_bytes(tensor)))
    outcome = work.compute(name, tensor)
    files: dict[str, dict[str, str]] = {}
    for (file, key), piece in outcome.tensors.items():
        staged.write(file, key, piece)
        files.setdefault(file, {})[key] = checksum(tensor_bytes(piece))
    return {"source": mark, "files": files, "note": dict(outcome.note)}


def _copy(work: Work, name: str, source: TensorSource, staged: StagedOutput) -> dict[str, Any]:
    passing = Checksum()
    chunks = passing.over(source.chunks(name, CHUNK))
    file = work.copies.get(name)
    if file is None:
        for _ in chunks:
            pass
    else:
        staged.write_bytes(file, name, chunks)
    mark = _checked(work, name, passing.text())
    return {"source": mark, "files": {file: {name: mark}} if file else {}}


def _checked(work: Work, name: str, mark: str) -> str:
    wanted = work.expected.get(name, mark)
    if wanted != mark:
        raise ArtifactError(
            f"{name} of {work.origin} is not the tensor that the adapter was made for (checksum {mark}, "
            f"not {wanted}); give the right model"
        )
    return mark


def source_checksums(staged: StagedOutput) -> dict[str, str]:
    """Checksum of every source tensor that passed."""
    return {name: record["source"] for name, record in staged.finished.items()}


def file_checksums(staged: StagedOutput) -> dict[str, dict[str, str]]:
    """Checksum of every tensor written, by file."""
    files: dict[str, dict[str, str]] = {}
    for record in staged.finished.values():
        for file, marks in record["files"].items():
            files.setdefault(file, {}).update(marks)
    return {file: files[file] for file in sorted(files)}


def notes(staged: StagedOutput) -> dict[str, dict[str, Any]]:
    """What was noted about every matrix."""
    return {name: record["note"] for name, record in staged.finished.items() if "note" in record}
