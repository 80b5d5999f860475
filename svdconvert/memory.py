"""How the process asks the system for memory, and when it gives it back."""

import ctypes
import os

# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGE, _KEPT = 8 << 20, 64 << 20


def return_freed_matrices() -> None:
    """Have glibc give matrices back to the system as soon as they are freed, and keep small blocks.

    By default it learns from the first large block that is freed to keep such blocks in its heap, where
    they fragment, in one heap for each thread: the peak then grows with the length of a run. Other C
    libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, _KEPT)
    mallopt(_ARENA_MAX, 1)


def use_huge_pages() -> None:
    """Have torch ask for huge pages: a product of large matrices then misses the TLB less.

    torch reads the variable at its first allocation; what the user set is left.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
