"""What the program asks of the system and of Python before it works."""

import subprocess
import sys


def test_the_collector_walks_seldom_and_not_at_the_end() -> None:
    program = (
        "import atexit, gc; from svdconvert.memory import collect_seldom;"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000));"  # runs after what is registered later
        "before = gc.get_threshold()[0]; collect_seldom(); print(gc.get_threshold()[0] > 10 * before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
