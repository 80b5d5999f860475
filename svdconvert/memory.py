"""Keep freed memory from staying with the process."""

import ctypes

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # M_MMAP_THRESHOLD and M_ARENA_MAX of glibc's malloc.h
_LARGE = 8 << 20


def return_freed_matrices() -> None:
    """Have glibc give matrices back to the system as soon as they are freed.

    By default it learns from the first large block that is freed to keep such blocks in its heap, where
    they fragment, in one heap for each thread: the peak then grows with the length of a run. Other C
    libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_ARENA_MAX, 1)
