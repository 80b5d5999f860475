"""Open files that hold weights without waiting for a named pipe or a device in their place."""

import os
import stat
from pathlib import Path

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
