"""Writing past the system's page cache.

A model would fill that with pages which are asked for once or never, push out what the user has there, and
wait for the disk at the end. On a virtual machine that gives its free pages back, each is first asked of
the host, which takes five times as long as writing it.

Two ways lead past it: whole pages go from the program's memory to the disk (O_DIRECT), and all else through
pages that the system lets go when they are on the disk (RWF_DONTCACHE).
"""

import ctypes
import errno
import fcntl
import os
import sys

PAGE = 4096
"""Bytes: whole pages at such offsets of a file and of memory go directly, whatever the disk."""

_FEW = 16 * PAGE  # below it a disk is asked more often than it is worth
# RWF_DONTCACHE of linux/fs.h (6.14, where the file system has it): what is written goes to the disk at once,
# and its pages are let go when it is there.
_DONTCACHE = 0x80
# What those answer that do not know it; the last where calls to the system are filtered.
_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM)


class Uncached:
    """How one output is written: past the cache until the system says that it cannot do that there.

    By one thread at a time, as a descriptor is set to direct writing and back.
    """

    def __init__(self) -> None:
        self._ways = [_directly, _dropping] if sys.platform == "linux" else []

    def write(self, descriptor: int, chunk: memoryview, offset: int) -> int:
        """Write what the system takes of a chunk at once; return how much. Raises OSError."""
        for way in list(self._ways):
            try:
                if count := way(descriptor, chunk, offset):
                    return count
            except NotImplementedError:  # a Python that was built for an older system
                self._ways.remove(way)
            except OSError as error:
                if error.errno not in _UNKNOWN:
                    raise
                self._ways.remove(way)
        return os.pwrite(descriptor, chunk, offset)


def _directly(descriptor: int, chunk: memoryview, offset: int) -> int:
    """The whole pages of a chunk that lies on them, in memory and in the file; none of another."""
    size = len(chunk) // PAGE * PAGE
    if size < _FEW or offset % PAGE or chunk.readonly or _address(chunk) % PAGE:
        return 0
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    try:
        return os.pwrite(descriptor, chunk[:size], offset)
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def _address(chunk: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(chunk))


def _dropping(descriptor: int, chunk: memoryview, offset: int) -> int:
    return os.pwritev(descriptor, [chunk], offset, _DONTCACHE)
