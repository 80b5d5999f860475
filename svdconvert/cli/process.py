"""Process-wide settings. Only the command line changes them, never the library."""

import atexit
import ctypes
import gc
import os
import sys
from io import TextIOWrapper

# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MMAP_MAX = -4
_ARENA_MAX = -8
_LARGE = 8 << 20
_KEPT = 64 << 20
_LARGEST_INT = 2**31 - 1
_NEW_OBJECTS = 50_000
_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Turn off the bars of huggingface_hub and transformers, of datasets, and of all that uses tqdm."""


def configure_libraries() -> None:
    """Set the environment variables that torch and huggingface_hub read when they are imported.

    Variables that the user has set are left alone, except those of progress bars: there is one display, see
    `progress`. THP_MEM_ALLOC_ENABLE lets torch ask for huge pages, which reduces TLB misses in products of
    large matrices.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in _BARS:
        os.environ[name] = "1"


def configure_streams() -> None:
    """Escape characters that the encoding of standard output or error cannot represent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def configure_garbage_collection() -> None:
    """Look for unreachable cycles every 50,000 new objects instead of 700, and not at the end of the process.

    Imports of torch make 250,000 objects that stay. Looking through them again and again, and once
    more at the end, takes 0.5 of the 1.6 s of processor time of `python -c "import torch"`.
    """
    gc.set_threshold(_NEW_OBJECTS)
    atexit.register(gc.freeze)


def configure_malloc_for_streaming() -> None:
    """Make glibc return large blocks to the system as soon as they are freed, and keep small ones.

    By default glibc raises its threshold after the first large block that is freed, keeps such blocks in one
    heap per thread and fragments them: peak memory then grows with the length of the run. Other C libraries
    are left as they are.
    """
    _mallopt({_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: _KEPT, _ARENA_MAX: 1})


def configure_malloc_for_training() -> None:
    """Make glibc keep all freed memory.

    Every training step allocates the blocks that the previous one freed. Returning them costs a tenth of a
    CPU step in page faults; keeping them raises the peak by their size.
    """
    _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST_INT})


def _mallopt(parameters: dict[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in parameters.items():
        mallopt(parameter, value)
