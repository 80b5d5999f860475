"""Run other programs, and measure their seconds and the peak of their anonymous memory."""

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SVDCONVERT = [sys.executable, "-m", "svdconvert"]
_INTERVAL = 0.01
"""Seconds between two readings of the memory."""
_READINGS = 50
"""Readings after which the child processes are listed anew."""
_SETTLING = 5.0
"""Seconds before each run: a virtual machine returns memory to its host two seconds after it was freed."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]


@dataclass(frozen=True)
class Measured:
    """One run of a command."""

    seconds: float
    memory: int
    """Peak anonymous memory of the process and its children, in bytes."""
    output: str
    """What it printed."""


def run(command: Sequence[object], threads: int | None = None, settling: float = _SETTLING) -> Measured:
    """Run a command to its end, and read its memory meanwhile.

    The clock starts after files of earlier runs are on the disk and, after `settling` seconds, their memory
    is returned to the system.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # so that bytecode is cached as in an installed program
    os.sync()
    time.sleep(settling)
    words = [str(word) for word in command]
    started = time.perf_counter()
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with watching(process.pid) as watched:
        output = process.communicate()[0]
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{output}")
    return Measured(seconds, watched.peak, output)


@dataclass
class Watched:
    """What was measured of a process so far."""

    peak: int = 0


@contextmanager
def watching(pid: int) -> Iterator[Watched]:
    """Measure the peak anonymous memory of a process and its children; memory-mapped files do not count.

    One reading takes 30 microseconds, so that the process keeps its cores; listing the children takes a
    millisecond and is done less often.
    """
    watched = Watched()
    over = threading.Event()

    def watch() -> None:
        readings = 0
        processes = [pid]
        while not over.wait(_INTERVAL):
            processes = _with_children(pid) if readings % _READINGS == 0 else processes
            watched.peak = max(watched.peak, sum(_rss_anon(process) for process in processes))
            readings += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield watched
    finally:
        over.set()
        watcher.join()


def _with_children(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


def _rss_anon(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def in_turn(runs: dict[str, Callable[[], Measured]], repeat: int) -> dict[str, list[Measured]]:
    """Run A B C A B C ...: what is compared meets the same load of the machine."""
    found: dict[str, list[Measured]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, once in runs.items():
            found[name].append(once())
    return found


def median(measured: Sequence[Measured]) -> float:
    """Median of the seconds."""
    return statistics.median(each.seconds for each in measured)


def ratio(above: Sequence[Measured], below: Sequence[Measured]) -> float:
    """Median of the ratios, pair by pair."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(above, below, strict=True))


def peak(measured: Sequence[Measured]) -> int:
    """Largest memory of all runs."""
    return max(each.memory for each in measured)
