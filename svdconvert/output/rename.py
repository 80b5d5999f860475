"""Renaming that never replaces anything: renameat2 on Linux, renamex_np on macOS.

POSIX rename replaces an empty directory and, for files, anything. Both systems have a call that refuses.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100  # fcntl.h, Linux
_RENAME_NOREPLACE = 1  # linux/fs.h
_RENAME_EXCL = 4  # sys/stdio.h, macOS
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def rename_to_free_name(source: Path, target: Path) -> None:
    """Rename `source` to `target`. Raises FileExistsError if `target` exists, and OSError as rename does."""
    code = _rename_exclusively(os.fsencode(source), os.fsencode(target))
    if code == 0:
        return
    if code is not None and code not in _UNSUPPORTED:
        raise OSError(code, os.strerror(code), str(target))
    # The file system has no such call. Creating the name first fails if anything has it.
    if source.is_dir():
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL))
    os.rename(source, target)


def _rename_exclusively(source: bytes, target: bytes) -> int | None:
    """0, an errno, or None if the C library has no such call."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(source, target, _RENAME_EXCL)
        else:
            failed = library.renameat2(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE)
    except (AttributeError, OSError):
        return None
    return ctypes.get_errno() if failed else 0
