"""What the program asks of the system and of Python before it works, and how it ends."""

import subprocess
import sys

import pytest


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_collector_walks_seldom() -> None:
    done = run(
        "import gc; from svdconvert.memory import collect_seldom;"
        "before = gc.get_threshold()[0]; collect_seldom(); print(gc.get_threshold()[0] > 100 * before)"
    )
    assert done.stdout.split() == ["True"]


LEAVING = """
import atexit, sys, threading, time
from svdconvert.memory import leave_at_once

class Last:
    def __del__(self):
        print("taken apart")

last = Last()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
with leave_at_once():
    print("out", end=" ")
    print("err", end=" ", file=sys.stderr)
    {leave}
"""


@pytest.mark.parametrize(
    ("leave", "code"), [("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 3), ("raise SystemExit", 0)]
)
def test_the_process_ends_with_its_code_and_all_that_was_said(leave: str, code: int) -> None:
    done = run(LEAVING.format(leave=leave))
    assert (done.returncode, done.stdout, done.stderr) == (code, "out thread\nregistered\n", "err ")


def test_other_ends_are_pythons_own() -> None:
    done = run(LEAVING.format(leave="sys.exit('a sentence')"))
    assert done.returncode == 1
    assert done.stdout == "out thread\nregistered\ntaken apart\n"
    assert "a sentence" in done.stderr
    done = run(LEAVING.format(leave="raise ValueError('wrong')"))
    assert done.returncode == 1
    assert "ValueError: wrong" in done.stderr


def test_a_reader_that_went_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m svdconvert list methods | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
