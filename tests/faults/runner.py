"""Runs commands of the program in forks of one warm process, each with at most one fault.

A new interpreter would take seconds to import torch and transformers for each of some thousand runs. The
process reads one JSON request per line and answers with one line.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.faults.injection import Injector
from tests.process import ROOT
from tests.program import svdconvert

OFFLINE = {"HF_HUB_OFFLINE": "1"}
_LONGEST = 120.0  # seconds of one run


class Runner:
    """A client of the warm process; a context manager."""

    def __init__(self, environment: Mapping[str, str] = OFFLINE) -> None:
        self._environment = environment

    def __enter__(self) -> "Runner":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **self._environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.runner"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def warm(self, words: list[object]) -> None:
        """Run one command, which must succeed, in the warm process itself."""
        ended = self.run(Path("/"), words, "warm")
        assert ended.status == 0, ended

    def run(self, root: Path, words: list[object], kind: str = "", at: int = 0) -> "Outcome":
        """Run one command with a fault at its call number `at` below `root`; without `at` undisturbed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"root": str(root), "words": [str(word) for word in words], "kind": kind, "at": at}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


class Outcome:
    """How a run ended."""

    def __init__(self, status: int, out: str, err: str, calls: list[str]) -> None:
        self.status = status
        """Exit status; negative: the number of a signal."""
        self.out = out
        self.err = err
        self.calls = calls
        """The calls that counted; empty if the run was killed."""

    def __repr__(self) -> str:
        return f"status {self.status}\n{self.out}\n{self.err}"


def _serve() -> None:
    import transformers

    transformers.logging.get_logger()  # bound to this process's standard error, which forks replace
    for line in sys.stdin:
        request = json.loads(line)
        words = request["words"]
        if request["kind"] == "warm":  # so that the forks find everything imported
            ended = svdconvert(*words)
            answer = {"status": ended.status, "out": ended.out, "err": ended.err, "calls": []}
        else:
            answer = _forked(**request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _forked(root: str, words: list[str], kind: str, at: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        child = os.fork()
        if child == 0:
            _run(Path(place), Path(root), words, kind, at)
        status = _wait(child)
        calls = Path(place) / "calls"
        return {
            "status": status,
            "out": (Path(place) / "out").read_text(),
            "err": (Path(place) / "err").read_text(),
            "calls": json.loads(calls.read_text() or "[]"),
        }


def _wait(child: int) -> int:
    deadline = time.monotonic() + _LONGEST
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a run took more than {_LONGEST} seconds")


def _run(place: Path, root: Path, words: list[str], kind: str, at: int) -> None:
    """Run the program in this process, and end it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
    injector = Injector(root, kind, at)
    calls = (place / "calls").open("w")
    injector.install()
    from svdconvert.__main__ import main

    status = 0
    try:
        sys.argv = ["svdconvert", *words]
        main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 99
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    json.dump(injector.log, calls)
    calls.close()
    os._exit(status)


if __name__ == "__main__":
    _serve()
