"""Files that hold weights: opened without waiting for a named pipe, read without being mapped.

A mapped file that is truncated during a run ends the process by SIGBUS; a read ends in an error message.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from svdconvert.errors import CheckpointError


def open_regular(path: Path) -> int:
    """A descriptor for reading; links are followed.

    Raises CheckpointError if `path` is anything but a regular file, OSError if it cannot be opened.
    """
    # Without O_NONBLOCK, opening a named pipe waits until something writes to it.
    flags = (
        os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no regular file (but a pipe, a device or a directory); give a file")
    return descriptor


class OpenFiles:
    """Files that are opened when they are read for the first time, and stay open."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._opening = Lock()

    def fill(self, path: Path, buffer: memoryview, offset: int, name: str) -> None:
        """Fill `buffer` with the bytes of a file from `offset` on; `name` is the tensor that they belong to.

        Raises CheckpointError if the file has become shorter or cannot be read.
        """
        try:
            descriptor = self._descriptor(path)
            while len(buffer):
                count = os.preadv(descriptor, [buffer], offset)
                if count == 0:
                    raise CheckpointError(
                        f"{path} was truncated while {name} was read; restore the file and run again"
                    )
                buffer = buffer[count:]
                offset += count
        except OSError as error:
            raise CheckpointError(
                f"{path}: {name} cannot be read: {error.strerror}; restore the file"
            ) from error

    def chunks(
        self, path: Path, span: range, name: str, size: int, buffer: memoryview | None = None
    ) -> Iterator[memoryview]:
        """The bytes `span` of a file in chunks of at most `size`; `name` is as in `fill`.

        With a `buffer`, the chunks are views of it and fill it. Without one, a chunk is valid only until the
        next one is requested.
        """
        reused = memoryview(bytearray(min(size, len(span))) if buffer is None else b"")
        for start in range(0, len(span), size):
            stop = min(start + size, len(span))
            chunk = reused[: stop - start] if buffer is None else buffer[start:stop]
            self.fill(path, chunk, span.start + start, name)
            yield chunk

    def _descriptor(self, path: Path) -> int:
        with self._opening:  # two threads may read the first tensor of a file at the same time
            if path not in self._open:
                self._open[path] = open_regular(path)
            return self._open[path]

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()
