"""Which calls of a command get a fault, how a run with a fault may end, and what the soak counts."""

import os
import signal

from tests.faults.injection import KINDS
from tests.faults.runner import Outcome

_CHOSEN = os.environ.get("SVDCONVERT_FAULTS")
STEP = None if _CHOSEN is None else 1 if _CHOSEN == "all" else int(_CHOSEN)
"""Every how many calls one has a fault, if the soak chooses it."""
POINTS = 5
"""Calls with a fault, for each command and kind, if nothing is chosen."""


def fault_points(kind: str, calls: int) -> range:
    """The numbers of the calls that get a fault of this kind, one in each run."""
    step = STEP or max(1, calls // POINTS)
    last = calls - KINDS.index(kind) % step  # the last calls are the most delicate ones
    return range(last, 0, -step)


def count_of(command: str, points: range) -> dict[str, object]:
    """A row of the table of faults."""
    return {"Faults": {"command": command, "faults": len(points), "wrong": 0}}


def wrong_end(ended: Outcome, kind: str, reference: Outcome) -> list[str]:
    """What is wrong with the exit status and the words of a run with a fault."""
    if ended.status == -signal.SIGKILL:
        return [] if "disk" not in kind else ["killed"]
    new = [line for line in ended.err.splitlines() if line not in reference.err.splitlines()]
    if "Traceback" in ended.err or "unexpected" in ended.err or ended.status not in (0, 1):
        return [f"no sentence: {ended}"]
    if ended.status == 1 and (len(new) != 1 or not new[0].startswith("svdconvert: ")):
        return [f"not one sentence: {ended}"]
    return []
