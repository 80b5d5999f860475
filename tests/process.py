"""The program as a separate process: to be killed, measured, or started several times."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = [sys.executable, "-m", "svdconvert"]
ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("SVDCONVERT_KILLS", "2"))
"""Kills of each writing command; `make soak` wants more."""


def start(*arguments: object, program: list[str] | None = None) -> "subprocess.Popen[str]":
    """Start a command with one thread of torch's. Programs of the tests are found from any directory."""
    words = [*(program or PROGRAM), *(str(argument) for argument in arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # If the tests themselves run in the background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait until a command has succeeded; what it wrote to standard error."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def finished_items(out: Path) -> int:
    """How many items the run for `out` has finished so far: tensors and modules by its journals, or steps."""
    staging = out.with_name(out.name + ".partial")
    steps = [int(path.stem.removeprefix("step-")) for path in staging.glob("checkpoints/step-*.pt")]
    return sum(_records(path) for path in staging.glob("journal*.jsonl")) + max(steps, default=0)


def _records(path: Path) -> int:
    try:
        return path.read_bytes().count(b'"record"')
    except FileNotFoundError:
        return 0


def wait_until_finished(process: "subprocess.Popen[str]", out: Path, items: int) -> None:
    """Return when the run has finished `items` items, or has ended."""
    while process.poll() is None and finished_items(out) < items and not out.exists():
        time.sleep(0.001)


def sums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
