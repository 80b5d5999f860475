"""Writing a file through the page cache and past it: seconds, and seconds of the system's own time.

    python benchmarks/writing.py [--room DIR] [--megabytes 600] [--pause 10]

The pause is for a virtual machine that gives its free pages back to the host: the next ones are new to it.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from svdconvert.checkpoint.uncached import Uncached

PIECE = 1 << 20

Write = Callable[[int, bytes, int], int]


def main() -> None:
    """Each way twice, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--room", type=Path, default=Path("/tmp"))
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--pause", type=float, default=10.0)
    arguments = parser.parse_args()
    table = Table("way", "written", "and synced", "system's time", title=f"{arguments.megabytes} MB")
    ways: dict[str, Write] = {"through the cache": os.pwrite, "past it": Uncached().write}
    for way, write in [*ways.items()] * 2:
        time.sleep(arguments.pause)
        seconds = measured(arguments.room / "written.bin", arguments.megabytes, write)
        table.add_row(way, *(f"{value:.2f} s" for value in seconds))
    Console().print(table)


def measured(path: Path, megabytes: int, write: Write) -> tuple[float, float, float]:
    """Seconds to write and to sync as well, and of system time."""
    piece = os.urandom(PIECE)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for place in range(megabytes):
        assert write(descriptor, piece, place * PIECE) == PIECE
    written = time.perf_counter() - started
    os.fsync(descriptor)
    os.close(descriptor)
    synced = time.perf_counter() - started
    path.unlink()
    return written, synced, resource.getrusage(resource.RUSAGE_SELF).ru_stime - before


if __name__ == "__main__":
    main()
