"""Weights that svdconvert wrote, compared with the checksums of their manifest while they are read.

A tensor is compared when its last byte is read, so that nothing is read twice. Only if its bytes are read in
another order, as several ranks read the experts of one tensor, it is read once more on its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from svdconvert.checkpoint.parts import find_part, whole_name
from svdconvert.checkpoint.safetensors_files import open_file
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, read_whole
from svdconvert.config.progress import report
from svdconvert.errors import ChangedError
from svdconvert.manifest.fingerprint import CHUNK, Checksum, file_checksum
from svdconvert.manifest.schema import PLAIN, Manifest, has_manifest, read_manifest
from svdconvert.output.file_kinds import file_kind
from svdconvert.output.ownership import MANIFEST_NAME

if TYPE_CHECKING:
    from torch import Tensor


def listing_manifest(path: Path) -> tuple[Path, Manifest] | None:
    """(directory, manifest) of the directory that svdconvert wrote and that `path` is, or is a file of.

    None if there is none. Raises ArtifactError if the manifest is damaged.
    """
    if path.is_dir():
        return (path, read_manifest(path)) if has_manifest(path) else None
    for directory in path.absolute().parents[:2]:  # an initial adapter is in a subdirectory
        if has_manifest(directory):
            manifest = read_manifest(directory)
            name = path.absolute().relative_to(directory).as_posix()
            return (directory, manifest) if name in (*manifest.files, *manifest.sidecars) else None
    return None


def compared(source: TensorSource, path: Path) -> TensorSource:
    """The weights at `path`, a model's directory or a file, which are compared while they are read.

    `source` itself if svdconvert did not write them. Raises ArtifactError if the manifest is damaged, or if
    its tensors are others.
    """
    found = listing_manifest(path)
    if found is None:
        return source
    directory, manifest = found
    name = "" if path == directory else path.absolute().relative_to(directory).as_posix()
    names = [name] if name in manifest.files else manifest.files_of("model")
    files = {directory / name: manifest.files[name] for name in names}
    return ComparedSource(source, files, directory, _advice(directory, manifest)) if files else source


def open_compared(path: Path) -> TensorSource:
    """The tensors of one file, which are compared while they are read if a manifest lists the file.

    Raises as `open_file` and `compared`.
    """
    return compared(open_file(path), path)


def require_unchanged_files(directory: Path, manifest: Manifest) -> None:
    """Read every tensor of a directory. Raises ChangedError if one has changed since it was written."""
    for file in manifest.files:
        source = open_compared(directory / file)
        if isinstance(source, ComparedSource):
            source.require_all()


def require_unchanged_sidecar(path: Path) -> None:
    """Raise ChangedError if a manifest lists another checksum of a file next to the weights."""
    found = listing_manifest(path)
    if found is None:
        return
    directory, manifest = found
    known = manifest.sidecars.get(path.absolute().relative_to(directory.absolute()).as_posix())
    if known is not None and path.is_file() and file_checksum(path) != known:
        raise ChangedError(
            f"{path} is not the file that {directory / MANIFEST_NAME} lists; {_advice(directory, manifest)}"
        )


def sidecar_remarks(paths: Iterable[Path]) -> Iterator[str]:
    """A sentence for each input whose configuration or tokenizer has changed since svdconvert wrote it.

    These may be edited on purpose, so they are used as they are.
    """
    for path in dict.fromkeys(path.absolute() for path in paths):
        found = listing_manifest(path) if path.is_dir() else None
        known = found[1].sidecars if found else {}
        changed = [
            name for name in known if file_kind(name) == "sidecar" and _differs(path / name, known[name])
        ]
        if changed:
            yield (
                f"{', '.join(changed[:3])} of {path}: changed after svdconvert wrote the directory, and used "
                "as now found"
            )


def _differs(path: Path, known: str) -> bool:
    """True for a changed file; an absent one may not have been copied."""
    return path.is_file() and file_checksum(path) != known


@dataclass(slots=True)
class _Listed:
    """A tensor, or a part of one, with the checksum that the manifest has for it."""

    name: str
    file: Path
    begin: int
    """Offset of its first byte in the tensor's data."""
    end: int
    checksum: str
    total: Checksum = field(default_factory=Checksum)
    position: int = 0
    """The offset up to which its bytes are in `total`."""
    is_equal: bool | None = None
    """None until all of its bytes have been read."""
    lock: Lock = field(default_factory=Lock)

    def add(self, offset: int, chunk: memoryview) -> None:
        """Add those bytes that are next; `offset` is that of the chunk in the tensor's data."""
        with self.lock:
            first = self.position - offset
            last = min(self.end - offset, len(chunk))
            if self.is_equal is None and 0 <= first < last:
                self.total.update(chunk[first:last])
                self.position = offset + last
                if self.position == self.end:
                    self.is_equal = self.total.text() == self.checksum


class ComparedSource:
    """A TensorSource whose tensors are compared with a manifest's checksums. Threads may read at one time."""

    def __init__(
        self, source: TensorSource, files: Mapping[Path, Mapping[str, str]], owner: Path, advice: str
    ) -> None:
        """`files` has the checksum of every tensor of `source`, by file and name; `owner` has the manifest.

        `advice` ends the sentence about a tensor that is not the listed one. Raises ChangedError if `files`
        lists a tensor that `source` does not have, or the reverse.
        """
        self._source = source
        self._manifest = owner / MANIFEST_NAME
        self._advice = advice
        self.infos: Mapping[str, TensorInfo] = source.infos
        self._listed: dict[str, list[_Listed]] = {}
        for file, checksums in files.items():
            for name, checksum in checksums.items():
                self._list(file, name, checksum)
        for name, info in source.infos.items():
            listed = self._listed.get(name)
            if listed is None or sum(one.end - one.begin for one in listed) != info.nbytes:
                raise ChangedError(
                    f"{next(iter(files)).parent} holds {name}, which {self._manifest} does not list; {advice}"
                )

    def _list(self, file: Path, name: str, checksum: str) -> None:
        infos = self._source.infos
        if name in infos:
            found = _Listed(name, file, 0, infos[name].nbytes, checksum)
        elif part := find_part(infos, name):
            end = part.begin + part.info.nbytes
            found = _Listed(name, file, part.begin, end, checksum, position=part.begin)
        else:
            raise ChangedError(f"{file} does not have {name}, which {self._manifest} lists; {self._advice}")
        self._listed.setdefault(name if name in infos else whole_name(name), []).append(found)

    def read(self, name: str) -> "Tensor":
        """The tensor, in newly allocated memory. Raises ChangedError if it has changed."""
        return read_whole(self, name)

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`; see TensorSource.

        Raises ChangedError before the chunk with which a tensor, or a part that the manifest lists, has been
        read whole and differs.
        """
        offset = (section or slice(None)).indices(self.infos[name].nbytes)[0]
        for one in self._listed[name]:
            if one.is_equal is None and one.position < offset < one.end:
                self._read_alone(name, one)
        for chunk in self._source.chunks(name, size, buffer, section):
            for one in self._listed[name]:
                if one.begin < offset + len(chunk) and offset < one.end:
                    one.add(offset, chunk)
                    self._require_equal(one)
            offset += len(chunk)
            yield chunk

    def _read_alone(self, name: str, one: _Listed) -> None:
        """Read a tensor of which some bytes were left out."""
        total = Checksum()
        for chunk in self._source.chunks(name, CHUNK, None, slice(one.begin, one.end)):
            total.update(chunk)
        one.is_equal = total.text() == one.checksum
        self._require_equal(one)

    def _require_equal(self, one: _Listed) -> None:
        if one.is_equal is False:
            raise ChangedError(
                f"{one.file}: {one.name} is not the tensor that {self._manifest} lists; {self._advice}"
            )

    def require_all(self) -> None:
        """Read every tensor that has not been read whole. Raises ChangedError if one has changed."""
        total = sum(info.nbytes for info in self.infos.values())
        done = 0
        for name, info in self.infos.items():
            report("check", done, total, "bytes", name=name)
            if not all(one.is_equal for one in self._listed[name]):
                for _ in self.chunks(name, CHUNK):
                    pass
            done += info.nbytes

    def file_versions(self) -> Mapping[str, list[int]]:
        """Those of the files that are read."""
        return self._source.file_versions()


def _advice(directory: Path, manifest: Manifest) -> str:
    """What to do about a changed file: a plain checkpoint or a LoRA may be changed on purpose."""
    if manifest.kind in (*PLAIN, "lora"):
        return "restore the file, or remove svdconvert.json if you changed it on purpose"
    return f"restore the file, or write {directory} again"
