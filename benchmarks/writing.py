"""Writing a file through the page cache and without keeping it there: seconds, and seconds of system time.

    python benchmarks/writing.py [--dir DIR] [--megabytes 600] [--pause 10]

The pause gives a virtual machine time to return its free pages to the host: later pages are then new to it.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from svdconvert.output.uncached import UncachedWriter

CHUNK = 4 << 20
"""Bytes of one call."""

Write = Callable[[int, memoryview, int], int]


def main() -> None:
    """Measure each way twice, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/tmp"))
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--pause", type=float, default=10.0)
    arguments = parser.parse_args()
    table = Table("way", "written", "and synced", "system time", title=f"{arguments.megabytes} MB")
    chunk = memoryview(os.urandom(CHUNK))
    ways: dict[str, Write] = {"page cache": os.pwrite, "UncachedWriter": UncachedWriter().write}
    for way, write in [*ways.items()] * 2:
        time.sleep(arguments.pause)
        seconds = measured(arguments.dir / "written.bin", arguments.megabytes, write, chunk)
        table.add_row(way, *(f"{value:.2f} s" for value in seconds))
    Console().print(table)


def measured(path: Path, megabytes: int, write: Write, chunk: memoryview) -> tuple[float, float, float]:
    """Seconds to write, seconds to write and sync, and seconds of system time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    started = time.perf_counter()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for place in range((megabytes << 20) // CHUNK):
        assert write(descriptor, chunk, place * CHUNK) == CHUNK
    written = time.perf_counter() - started
    os.fsync(descriptor)
    os.close(descriptor)
    synced = time.perf_counter() - started
    path.unlink()
    return written, synced, resource.getrusage(resource.RUSAGE_SELF).ru_stime - before


if __name__ == "__main__":
    main()
