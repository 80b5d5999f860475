"""What a Hub keeps: repositories of commits, each a table from paths to files, and the bytes on disk."""

import base64
import hashlib
import itertools
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

MAIN = "main"
LARGE = (".safetensors", ".bin", ".pth", ".model", ".gguf")
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


class StaleParent(Exception):
    """The branch has another head than the commit's parent."""


class Absent(Exception):
    """No such revision or file; the Hub's word for it."""


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    sha256: str
    size: int
    oid: str
    """Git's: of the content, or of the pointer to it."""
    large: bool

    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


class Store:
    """The bytes of all files, by SHA-256."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.directory / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).exists()

    def put(self, stream: BinaryIO, size: int, sha256: str | None = None) -> str | None:
        """Keep `size` bytes; their SHA-256, or None if there are fewer or it is not `sha256`."""
        sum_, left = hashlib.sha256(), size
        arriving = self.directory / f"arriving-{id(stream)}"
        with arriving.open("wb") as out:
            while left and (chunk := stream.read(min(left, 1 << 20))):
                sum_.update(chunk)
                out.write(chunk)
                left -= len(chunk)
        if left or sha256 not in (None, sum_.hexdigest()):
            arriving.unlink()
            return None
        arriving.rename(self.path(sum_.hexdigest()))
        return sum_.hexdigest()

    def join(self, parts: Iterable[Path], sha256: str) -> bool:
        """Join `parts` into one file; False if its SHA-256 is another one."""
        joined = self.directory / f"joining-{sha256}"
        with joined.open("wb") as out:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, out)
        with joined.open("rb") as stream:
            return self.put(stream, joined.stat().st_size, sha256) is not None


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    parent: str | None
    title: str
    files: Mapping[str, File]


@dataclass
class Repository:
    """One repository: references to commits."""

    name: str
    store: Store
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: Iterable[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self._add(MAIN, None, "initial commit", {})

    def head(self, revision: str = MAIN) -> Commit:
        """The commit of a branch, a pull request, or the (full or short) name of a commit."""
        short = next((oid for oid in self.commits if len(revision) > 6 and oid.startswith(revision)), None)
        oid = self.refs.get(revision, short)
        if oid is None:
            raise Absent("RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str = MAIN) -> list[str]:
        """The titles of all commits, newest first."""
        titles, oid = [], self.head(revision).oid
        while oid is not None:
            titles.append(self.commits[oid].title)
            oid = self.commits[oid].parent
        return titles

    def file(self, revision: str, path: str) -> File:
        if path not in self.head(revision).files:
            raise Absent("EntryNotFound")
        return self.head(revision).files[path]

    def read(self, path: str, revision: str = MAIN) -> bytes:
        return self.store.path(self.file(revision, path).sha256).read_bytes()

    def names(self, revision: str = MAIN) -> list[str]:
        return sorted(self.head(revision).files)

    def fill(self, directory: Path, title: str = "filled by a test") -> Commit:
        """Commit every file of a local directory, without HTTP."""
        files = dict(self.head().files)
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = str(path.relative_to(directory))
            with path.open("rb") as stream:
                sha256 = self.store.put(stream, path.stat().st_size)
            assert sha256 is not None
            files[name] = self._file(sha256, name.endswith(LARGE))
        return self._add(MAIN, self.head().oid, title, files)

    def commit(self, revision: str, lines: list[dict[str, Any]], *, pull: bool) -> tuple[Commit, int | None]:
        """Apply a commit's lines; the new commit and the pull request's number, or None."""
        header = lines[0]["value"]
        head = self.head(revision)
        if header.get("parentCommit") not in (None, head.oid):
            raise StaleParent
        files = dict(head.files)
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        number = next(iter(self.pulls)) if pull else None
        ref = revision if number is None else f"refs/pr/{number}"
        return self._add(ref, head.oid, header["summary"], files), number

    def _apply(self, files: dict[str, File], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "lfsFile":
            if not self.store.has(value["oid"]):
                raise Absent("EntryNotFound")
            files[path] = self._file(value["oid"], True)
        elif key == "file":
            content = base64.b64decode(value["content"])
            self.store.path(hashlib.sha256(content).hexdigest()).write_bytes(content)
            files[path] = self._file(hashlib.sha256(content).hexdigest(), False)
        elif key == "deletedFile":
            if path not in files:
                raise Absent("EntryNotFound")
            del files[path]
        else:
            raise AssertionError(key)

    def _file(self, sha256: str, large: bool) -> File:
        size = self.store.path(sha256).stat().st_size
        content = _POINTER.format(sha256, size).encode() if large else self.store.path(sha256).read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return File(sha256, size, oid, large)

    def _add(self, ref: str, parent: str | None, title: str, files: Mapping[str, File]) -> Commit:
        text = repr((self.name, ref, parent, title, sorted(files.items()), len(self.commits)))
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, files)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit
