"""Signals end a command, also where Python loses what they raise."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from svdconvert import console
from svdconvert.progress import Progress
from svdconvert.stopping import Terminated, heeding, stoppable

STEP = Progress("w", "f", 1, 2)


class Dying:
    """What takes a signal while it is taken apart."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_unwinds_the_program(number: int, kind: type[BaseException]) -> None:
    with pytest.raises(kind), stoppable():
        signal.raise_signal(number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_lost_in_a_destructor_is_heeded_at_the_next_step(
    number: int, kind: type[BaseException]
) -> None:
    seen: list[Progress] = []
    with pytest.raises(kind), stoppable():
        track = heeding(seen.append)
        track(STEP)
        Dying(number)
        track(STEP)
    assert seen == [STEP]
    heeding(seen.append)(STEP)  # it is forgotten with the command
    assert seen == [STEP, STEP]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ["decompose", "train"])
def test_the_program_ends_as_if_it_had_not_been_lost(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(console.typer.Exit) as ended, console.telling(debug=False):
        if what == "train":
            with console.training() as told:
                Dying(signal.SIGINT)
                told(None, 1)  # type: ignore[arg-type]
        else:
            with console.progress("decompose") as track:
                Dying(signal.SIGINT)
                track(STEP)
    assert ended.value.exit_code == 130
    assert "svdconvert: interrupted" in capsys.readouterr().err


def test_a_job_in_the_background_is_not_interrupted() -> None:
    program = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from svdconvert.stopping import stoppable
with stoppable():
    signal.raise_signal(signal.SIGINT)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "still here\n"
