"""Faults at the file system calls of a process: counted, and one of them failing or killing the process.

The functions of `os` and `io` through which the program changes or reads files are replaced, in this process
only, by ones that call `Injector.point` first. Only calls on paths below one directory count.
"""

import builtins
import errno
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any, cast

from svdconvert.output import pth_archive, rename

KINDS = ("full disk", "broken disk", "kill before", "kill after", "torn write")
"""ENOSPC from this call on, EIO at this call, SIGKILL before it, after it, and after half of a write."""
_GROWING = ("open", "write", "mkdir", "rename")  # what a full disk refuses
_CREATES = os.O_CREAT | os.O_TRUNC


class Injector:
    """Counts calls below `root`; the call number `at` (from 1) gets the fault `kind`."""

    def __init__(self, root: Path, kind: str = "", at: int = 0) -> None:
        self.log: list[str] = []
        """The calls so far, as "write /path"."""
        self._root = os.fspath(root) + os.sep
        self._kind = kind
        self._at = at
        self._lock = RLock()

    def call(self, what: str, path: Any, function: Callable[[], Any], half: Callable[[], Any] | None) -> Any:
        """Call `function`, unless this is the call for the fault. `half` does half of a write."""
        name = self._name(path)
        if not (name + os.sep).startswith(self._root):
            return function()
        with self._lock:
            self.log.append(f"{what} {name}")
            number = len(self.log)
        is_due = number == self._at
        if is_due and self._kind == "torn write" and half is not None:
            half()
        if is_due and self._kind in ("kill before", "torn write"):
            _kill()
        if is_due and self._kind == "broken disk":
            raise OSError(errno.EIO, os.strerror(errno.EIO), *_named(path))
        if self._kind == "full disk" and number >= self._at > 0 and what in _GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *_named(path))
        result = function()
        if is_due and self._kind == "kill after":
            _kill()
        return result

    def _name(self, path: Any) -> str:
        if isinstance(path, int):
            try:
                return os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return ""
        return os.path.abspath(os.fsdecode(path))

    def install(self) -> None:
        """Replace the functions, for the rest of this process's life."""
        assert shutil.rmtree.avoids_symlink_attacks  # so it calls os.unlink and os.rmdir with dir_fd
        pwrite = os.pwrite
        halves: dict[str, Callable[..., Any]] = {
            "pwrite": lambda file, data, offset: pwrite(file, data[: len(data) // 2], offset),
            "pwritev": lambda file, parts, offset, flags: pwrite(
                file, parts[0][: len(parts[0]) // 2], offset
            ),
        }
        for what, names in {
            "sync": ("fsync",),
            "mkdir": ("mkdir",),
            "read": ("pread", "preadv"),
            "rename": ("rename", "replace"),
            "unlink": ("unlink", "remove", "rmdir"),
            "write": ("pwrite", "pwritev", "sendfile", "ftruncate"),
        }.items():
            for name in names:
                self._replace(name, what, halves.get(name))
        self._replace_rename()
        self._replace_archives()
        self._replace_opens()

    def _replace(self, name: str, what: str, half: Callable[..., Any] | None) -> None:
        """Replace a function of `os` whose first argument is a path or a descriptor."""
        real = getattr(os, name)

        def function(path: Any, *more: Any, **named: Any) -> Any:
            place = self._below(path, named.get("dir_fd"))
            return self.call(
                what, place, lambda: real(path, *more, **named), half and (lambda: half(path, *more))
            )

        setattr(os, name, function)

    def _below(self, path: Any, directory: int | None) -> Any:
        """The path of a call with `dir_fd`, as shutil.rmtree calls."""
        return path if directory is None else os.path.join(self._name(directory), os.fsdecode(path))

    def _replace_rename(self) -> None:
        """The program's own rename, which calls the C library."""
        real = rename._rename_exclusively

        def function(source: bytes, target: bytes) -> int | None:
            try:
                return cast("int | None", self.call("rename", target, lambda: real(source, target), None))
            except OSError as error:
                return error.errno

        rename._rename_exclusively = function

    def _replace_archives(self) -> None:
        """torch's own writer of archives, which does not write through Python."""
        real = pth_archive.lay_out

        def function(path: Path, infos: Any) -> None:
            def half() -> None:
                real(path, infos)
                os.truncate(path, path.stat().st_size // 2)

            self.call("write", path, lambda: real(path, infos), half)

        pth_archive.lay_out = function

    def _replace_opens(self) -> None:
        real_open, os_open = io.open, os.open
        injector = self

        class File(io.FileIO):
            """A file whose writes count."""

            def write(self, data: Any) -> int:
                write = super().write
                return injector.call(
                    "write", self.fileno(), lambda: write(data), lambda: write(bytes(data)[: len(data) // 2])
                )

            def truncate(self, size: int | None = None) -> int:
                truncate = super().truncate
                return injector.call("write", self.fileno(), lambda: truncate(size), None)

        def faulty_os_open(path: Any, flags: int, *more: Any, **named: Any) -> int:
            place = injector._below(path, named.get("dir_fd"))
            what = "open" if flags & _CREATES else "open to read"
            return injector.call(what, place, lambda: os_open(path, flags, *more, **named), None)

        def faulty_open(  # noqa: PLR0913 (the parameters of io.open)
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not {"w", "a", "x", "+"} & set(mode) or isinstance(file, int):
                named = (buffering, encoding, errors, newline, closefd, opener)
                what = "read" if isinstance(file, int) else "open to read"
                return injector.call(what, file, lambda: real_open(file, mode, *named), None)
            raw = injector.call(
                "open", file, lambda: File(file, mode.replace("b", "").replace("t", "")), None
            )
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        os.open = faulty_os_open
        io.open = builtins.open = faulty_open


def _named(path: Any) -> tuple[Any, ...]:
    return () if isinstance(path, int) else (os.fsdecode(path),)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
