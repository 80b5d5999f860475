"""Writing past the system's page cache.

A model would fill that with pages which are asked for once or never, push out what the user has there, and
wait for the disk at the end. On a virtual machine that gives its free pages back, each is first asked of
the host, which takes five times as long as writing it.
"""

import errno
import os
import sys

# RWF_DONTCACHE of linux/fs.h (6.14, where the file system has it): what is written goes to the disk at once,
# and its pages are let go when it is there.
_DONTCACHE = 0x80
# What those answer that do not know it; the last where calls to the system are filtered.
_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM)


class Uncached:
    """How one output is written: past the cache until the system says that it cannot do that there."""

    def __init__(self) -> None:
        self._possible = sys.platform == "linux"

    def write(self, descriptor: int, chunk: memoryview | bytes, offset: int) -> int:
        """Write what the system takes of a chunk at once; return how much. Raises OSError."""
        if self._possible:
            try:
                return os.pwritev(descriptor, [chunk], offset, _DONTCACHE)
            except NotImplementedError:  # a Python that was built for an older system
                self._possible = False
            except OSError as error:
                if error.errno not in _UNKNOWN:
                    raise
                self._possible = False
        return os.pwrite(descriptor, chunk, offset)
