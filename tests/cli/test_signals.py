"""Signals end a command through exceptions."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from svdconvert.cli.signals import TerminatedError, raise_on_signals

HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Python's own handlers, also if the tests run in the background of a shell, which ignores SIGINT."""
    before = {number: signal.signal(number, handler) for number, handler in HANDLERS.items()}
    yield
    left = {number: signal.getsignal(number) for number in HANDLERS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == HANDLERS


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TerminatedError)]
)
def test_a_signal_raises_an_exception(number: int, kind: type[BaseException]) -> None:
    with pytest.raises(kind), raise_on_signals():
        signal.raise_signal(number)


@pytest.mark.processes
def test_a_job_in_the_background_is_not_interrupted() -> None:
    program = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from svdconvert.cli.signals import raise_on_signals
with raise_on_signals():
    signal.raise_signal(signal.SIGINT)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "still here\n"
