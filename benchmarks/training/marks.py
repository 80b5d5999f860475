"""When the steps of a run ended, and what is printed of them. Needs no svdconvert."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

WARM = 2
"""Number of first steps that are not counted."""


@dataclass(frozen=True)
class Mark:
    """The end of a step."""

    loss: float
    elapsed: float = field(default_factory=time.perf_counter)
    processor: float = field(default_factory=time.process_time)


def report(marks: list[Mark]) -> None:
    """Print {"step", "processor": seconds of a step, "memory": peak of the process in bytes, "loss": last}.

    The seconds are the slope between the last warm step and the last step.
    """
    first, last = marks[WARM - 1], marks[-1]
    count = len(marks) - WARM
    found = {
        "step": (last.elapsed - first.elapsed) / count,
        "processor": (last.processor - first.processor) / count,
        "memory": peak_memory(),
        "loss": last.loss,
    }
    print(json.dumps(found))


def peak_memory() -> int:
    """The peak resident memory of this process so far (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
