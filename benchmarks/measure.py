"""Whole processes, measured: seconds, and the peak of their anonymous memory."""

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
_BETWEEN_LOOKS, _LOOKS = 0.01, 50  # seconds; and so many looks until the next at who its children are
_SETTLING = 5.0  # seconds; a virtual machine gives free memory back to its host two after it was freed
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]


@dataclass(frozen=True)
class Measured:
    """One run of a command."""

    seconds: float
    memory: int
    """Peak anonymous memory of the process and its children, in bytes."""
    said: str
    """What it printed."""


def run(command: Sequence[object], threads: int | None = None) -> Measured:
    """Run a command to its end, and look at its memory meanwhile.

    What an earlier one left to the system, files to write and memory to hand back, is not this one's work: it
    is waited for before the clock starts.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled once, not at every start
    os.sync()
    time.sleep(_SETTLING)
    words = [str(word) for word in command]
    started = time.perf_counter()
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with watching(process.pid) as watched:
        said = process.communicate()[0]
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{said}")
    return Measured(seconds, watched.peak, said)


@dataclass
class Watched:
    """What was seen of a process so far."""

    peak: int = 0


@contextmanager
def watching(pid: int) -> Iterator[Watched]:
    """Look at the anonymous memory of a process and its children; memory-mapped files do not count.

    Without taking a core that the process wants: a look takes 30 microseconds; who the children are takes a
    millisecond, and is asked seldom.
    """
    watched, over = Watched(), threading.Event()

    def watch() -> None:
        looks, family = 0, [pid]
        while not over.wait(_BETWEEN_LOOKS):
            family = _family(pid) if looks % _LOOKS == 0 else family
            watched.peak = max(watched.peak, sum(_rss_anon(member) for member in family))
            looks += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield watched
    finally:
        over.set()
        watcher.join()


def _family(pid: int) -> list[int]:
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
    """A B C A B C ...: what is compared meets the same moods of the machine."""
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
