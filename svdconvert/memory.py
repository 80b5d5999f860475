"""How the process asks the system for memory, and when it gives it back, at the latest at its end."""

import atexit
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_LARGE, _KEPT = 8 << 20, 64 << 20
_MOST = 2**31 - 1


def return_freed_matrices() -> None:
    """Have glibc give matrices back to the system as soon as they are freed, and keep small blocks.

    By default it learns from the first large block that is freed to keep such blocks in its heap, where
    they fragment, in one heap for each thread: the peak then grows with the length of a run. Other C
    libraries are left as they are.
    """
    _tune({_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: _KEPT, _ARENA_MAX: 1})


def keep_freed_blocks() -> None:
    """Have glibc keep all that is freed, for what is needed next.

    For training: every step asks for the blocks that the step before has freed. Given back, their pages come
    again one by one and wiped, at a tenth of a step's time on a CPU; kept, they raise the peak by as much.
    """
    _tune({_MMAP_MAX: 0, _TRIM_THRESHOLD: _MOST})


def _tune(parameters: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in parameters.items():
        mallopt(parameter, value)


def use_huge_pages() -> None:
    """Have torch ask for huge pages: a product of large matrices then misses the TLB less.

    torch reads the variable at its first allocation; what the user set is left.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def collect_seldom(objects: int = 1_000_000) -> None:
    """Spare Python's collector its walks through the hundreds of thousands of objects that torch is made of.

    It comes when so many more were made than freed. It finds nothing while torch is imported, and little
    later: tensors are freed when the last name of them goes, and do not wait for it.
    """
    gc.set_threshold(objects)


@contextmanager
def leave_at_once() -> Iterator[None]:
    """End the process where `SystemExit` would, with all that is registered for the end, but as it stands.

    Python would first take apart every module that was imported, one object after the other, which takes a
    tenth of a second with torch among them; the system frees it all in one.
    """
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except BrokenPipeError:  # whoever read it is gone
                pass
            except (OSError, ValueError):  # Python complains of what is lost, and ends with 120
                raise end from None
        os._exit(end.code or 0)
