"""A rank whose peers never come heeds signals, and does not wait for ever."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from svdconvert.config.ranks import find_ranks
from svdconvert.errors import RecipeError
from tests.process import ROOT

ALONE = """
import os
from svdconvert.config import ranks
ranks._LONGEST_START = {seconds}
connect = ranks._connect
def announced(found):
    os.write(1, b"waiting\\n")  # not by sys.stdout, whose lock this thread would hold when the program ends
    connect(found)
ranks._connect = announced
from svdconvert.__main__ import main
main()
"""


def alone(rank: int, seconds: float, out: Path) -> "subprocess.Popen[str]":
    """One of two ranks, when it has begun to wait for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["decompose", "absent", "-o", str(out), "--rank", "2"]
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE.format(seconds=seconds), *words],
        env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    return process


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_rank_that_waits_for_its_peers_heeds_signals(
    rank: int, number: signal.Signals, status: int, tmp_path: Path
) -> None:
    process = alone(rank, 600, tmp_path / "out")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert said.startswith(("svdconvert: interrupted; nothing", "svdconvert: terminated; nothing")), said


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_peers_never_come_ends_with_a_sentence(rank: int, tmp_path: Path) -> None:
    _, said = (process := alone(rank, 1, tmp_path / "out")).communicate(timeout=60)
    assert process.returncode == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("svdconvert: ")]
    assert f"rank {rank} of 2 waited 1 seconds for the others" in line and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "2"}, "RANK is 'not set'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT is 'not set'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_a_sentence(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=named):
        find_ranks()
