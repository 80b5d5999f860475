"""The program as a process of its own: to be killed, measured, or started several times over."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = [sys.executable, "-m", "svdconvert"]


def start(*arguments: object, program: list[str] | None = None) -> "subprocess.Popen[str]":
    """Start a command with one thread, as launchers do."""
    words = [*(program or PROGRAM), *(str(argument) for argument in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests themselves run in the background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for success; what it said on standard error."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def finished_items(out: Path) -> int:
    """How many items the run for `out` has finished so far, by its journals."""
    journals = out.with_name(out.name + ".partial").glob("journal*.jsonl")
    return sum(max(0, _lines(path) - 1) for path in journals)


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_until_finished(process: "subprocess.Popen[str]", out: Path, items: int) -> None:
    """Return when the run has finished `items` items, or ended."""
    while process.poll() is None and finished_items(out) < items and not out.exists():
        time.sleep(0.001)


def sums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
