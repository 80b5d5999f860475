"""Writing a file through the page cache and past it: seconds, and seconds of the system's own time.

    python benchmarks/writing.py [--room DIR] [--megabytes 600] [--pause 10]

The pause is for a virtual machine that gives its free pages back to the host: the next ones are new to it.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path

from rich.console import Console
from rich.table import Table

from svdconvert.output.uncached import Uncached

PIECE, PAGE = 4 << 20, 4096

Write = Callable[[int, memoryview, int], int]


def main() -> None:
    """Each way twice, in turn. Only memory that lies on pages is written directly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--room", type=Path, default=Path("/tmp"))
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--pause", type=float, default=10.0)
    arguments = parser.parse_args()
    table = Table("way", "written", "and synced", "system's time", title=f"{arguments.megabytes} MB")
    memory = memoryview(mmap(-1, PIECE + PAGE))
    memory[:] = os.urandom(len(memory))
    ways: dict[str, tuple[Write, memoryview]] = {
        "through the cache": (os.pwrite, memory[:PIECE]),
        "past it, dropping": (Uncached().write, memory[64:][:PIECE]),
        "past it, directly": (Uncached().write, memory[:PIECE]),
    }
    for way, (write, piece) in [*ways.items()] * 2:
        time.sleep(arguments.pause)
        seconds = measured(arguments.room / "written.bin", arguments.megabytes, write, piece)
        table.add_row(way, *(f"{value:.2f} s" for value in seconds))
    Console().print(table)


def measured(path: Path, megabytes: int, write: Write, piece: memoryview) -> tuple[float, float, float]:
    """Seconds to write and to sync as well, and of system time."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for place in range((megabytes << 20) // PIECE):
        assert write(descriptor, piece, place * PIECE) == PIECE
    written = time.perf_counter() - started
    os.fsync(descriptor)
    os.close(descriptor)
    synced = time.perf_counter() - started
    path.unlink()
    return written, synced, resource.getrusage(resource.RUSAGE_SELF).ru_stime - before


if __name__ == "__main__":
    main()
