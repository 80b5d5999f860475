"""Keep freed memory from staying with the process."""

import ctypes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_LARGE = 8 << 20


def return_freed_matrices() -> None:
    """Have glibc give matrices back to the system as soon as they are freed.

    By default it learns from the first large block that is freed to keep such blocks in its heap, where
    they fragment: the peak then grows with the length of a run. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
