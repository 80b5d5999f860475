"""Runs generated programs one by one, each in a fresh Python process that has confined itself (child.py)."""

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from svdconvert.errors import SandboxError
from svdconvert.evaluation.sandbox import macos
from svdconvert.evaluation.sandbox.seccomp import ARCHITECTURES, call_filter

Mode = Literal["auto", "none"]

_CHILD = Path(__file__).with_name("child.py")
_MEMORY = 4 << 30
_LARGEST_FILE = 1 << 20
_OPEN_FILES = 64
_LONGEST_PROGRAM = 1 << 20
_LONGEST_REPORT = 4096
# By the clock a program gets this many times its seconds of processor time, and what a start may take.
_PATIENCE = 3
_START = 5.0
_ADVICE = "run svdconvert in a container in which nothing matters, and give --sandbox none there"


@dataclass(frozen=True)
class Sandbox:
    """Confines programs by what the system has; `layers` says by what."""

    mode: Mode
    layers: tuple[str, ...]

    @classmethod
    def open(cls, mode: Mode = "auto") -> "Sandbox":
        """Find out whether programs can be confined here, by running one that tries to escape.

        "none" confines by limits of time, memory and file size alone. Raises SandboxError if "auto" is asked
        for and the system has neither Landlock with seccomp nor sandbox-exec.
        """
        if mode == "auto":
            _refuse_unknown_system()
        layers = _layers_of_a_probe(mode)
        return cls(mode, layers)

    def run(self, program: str, seconds: float) -> bool:
        """True if the program ends without an error in `seconds` of processor time.

        By the clock it may take three times as long, so that a busy machine makes no difference. Raises
        SandboxError if the program could not be confined, in which case it was not run.
        """
        return _run(program, seconds, self.mode).passed


@dataclass(frozen=True)
class _Outcome:
    passed: bool
    layers: tuple[str, ...] = ()


def _refuse_unknown_system() -> None:
    if sys.platform == "darwin" and os.access(macos.PROGRAM, os.X_OK):
        return
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise SandboxError(
            f"generated code cannot be confined on {platform.system()} {platform.machine()}, only on Linux "
            f"(x86-64 and aarch64) and macOS; {_ADVICE}"
        )


_PROBE = """
import os
for attempt in (
    lambda: open({secret!r}),
    lambda: open({written!r}, "w"),
    lambda: os.chmod({secret!r}, 0o777),
    lambda: os.fork(),
    lambda: os.execv({python!r}, ["python"]),
    lambda: __import__("socket").socket(),
):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit(1)
"""


def _layers_of_a_probe(mode: Mode) -> tuple[str, ...]:
    """The layers in force. Raises SandboxError if a program that tries to escape succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "secret")
        secret.write_text("secret")
        written = Path(folder, "written")
        probe = _PROBE.format(secret=str(secret), written=str(written), python=sys.executable)
        outcome = _run(probe if mode == "auto" else "", 5.0, mode)
    if not outcome.passed:
        raise SandboxError(
            f"a program that tried to leave its sandbox here was not stopped, or could not be run; {_ADVICE}"
        )
    return outcome.layers


def _run(program: str, seconds: float, mode: Mode) -> _Outcome:
    if len(program) > _LONGEST_PROGRAM:
        return _Outcome(False)
    token = secrets.token_hex(16)
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as given:
            task = _task(program, seconds, mode) | {"token": token, "report": writing}
            # Half of a surrogate pair stays an escape in JSON, and is then an error of the program.
            given.write(json.dumps(task).encode())
            given.seek(0)
            process = subprocess.Popen(
                _command(mode),
                stdin=given,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writing,),
                cwd=folder,
                env={},
                start_new_session=True,
            )
            _wait(process, _START + _PATIENCE * seconds)
        os.set_blocking(reading, False)
        with suppress(BlockingIOError):
            return _outcome(os.read(reading, _LONGEST_REPORT), token)
        return _Outcome(False)
    finally:
        os.close(reading)
        os.close(writing)


def _command(mode: Mode) -> list[str]:
    python = sys.executable
    # -I: no user's modules or variables. -S: no installed packages, as in the tests of HumanEval and MBPP.
    plain = [python, "-I", "-S", "-B", str(_CHILD)]
    if mode == "auto" and sys.platform == "darwin":
        return [*macos.command(os.path.realpath(python), _readable()), *plain]
    return plain


def _task(program: str, seconds: float, mode: Mode) -> dict[str, Any]:
    limits: dict[str, int] = {
        "CPU": int(seconds + 0.999),
        "FSIZE": _LARGEST_FILE,
        "NOFILE": _OPEN_FILES,
        "CORE": 0,
    }
    if sys.platform == "linux":
        limits["AS"] = _MEMORY
    task: dict[str, Any] = {"program": program, "limits": limits}
    if mode == "auto" and sys.platform == "linux":
        machine = platform.machine()
        task["linux"] = {"machine": machine, "readable": _readable(), "filter": call_filter(machine)}
    return task


def _readable() -> list[str]:
    """What the interpreter needs to import the standard library."""
    paths = sysconfig.get_paths()
    own = [paths["stdlib"], paths["platstdlib"], str(Path(sys.base_prefix, "lib")), str(_CHILD)]
    system = [
        "/usr/lib",
        "/usr/lib64",
        "/usr/share/zoneinfo",
        "/lib",
        "/lib64",
        "/etc/ld.so.cache",
        "/dev/urandom",
    ]
    return [os.path.realpath(path) for path in dict.fromkeys([*own, *system])]


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Wait for the end of the process, and end what is left of its session."""
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _outcome(report: bytes, token: str) -> _Outcome:
    first, _, rest = report.partition(b"\n")
    try:
        said = json.loads(first)
    except (ValueError, RecursionError):
        return _Outcome(False)
    if not isinstance(said, dict) or not isinstance(said.get("layers", []), list):
        return _Outcome(False)
    if "error" in said:
        raise SandboxError(f"a generated program cannot be confined here ({said['error']}); {_ADVICE}")
    layers = tuple(map(str, said.get("layers", [])))
    if sys.platform == "darwin":
        layers = (*layers, *macos.LAYERS)
    return _Outcome(rest == token.encode(), layers)
