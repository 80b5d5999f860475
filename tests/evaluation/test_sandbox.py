"""Generated programs: right ones pass, and nothing that they do is seen outside."""

import os
import platform
import re
import socket
import sys
from pathlib import Path

import pytest

from svdconvert.errors import SandboxError
from svdconvert.evaluation.sandbox import macos, runner
from svdconvert.evaluation.sandbox.runner import Sandbox
from svdconvert.evaluation.sandbox.seccomp import (
    ALLOWED_NEW,
    ARCHITECTURES,
    CLONE,
    FCNTL,
    PRLIMIT,
    REFUSED,
    TGKILL,
)

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox.open()
    except SandboxError as error:
        pytest.skip(str(error))


def test_what_is_in_force_is_said(sandbox: Sandbox) -> None:
    if sys.platform == "linux":
        assert any(layer.startswith("Landlock") for layer in sandbox.layers) and "seccomp" in sandbox.layers
    assert Sandbox.open("none").layers == sandbox.layers[:2]


@pytest.mark.parametrize(
    "program",
    [
        "",
        "import collections, datetime, decimal, hashlib, itertools, math, re, typing; hashlib.md5(b'')",
        "import threading; t = threading.Thread(target=len, args=('',)); t.start(); t.join()",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "x = bytearray(1 << 26)",
        "if __name__ == '__main__':\n    raise ValueError('an example must not run')",
        "print('é' * 10)",
        "open('/dev/null', 'w').write('x')",
    ],
)
def test_right_programs_pass(sandbox: Sandbox, program: str) -> None:
    assert sandbox.run(program, 10)


CALL = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); assert libc.syscall({}) >= 0"


@pytest.mark.parametrize(
    "program",
    [
        "1 / 0",
        "assert False",
        "def f(:",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os; os.abort()",
        "import os; os.closerange(0, 100)",
        "x = '\ud800'",
        "open('/etc/passwd')",
        "import os; os.listdir('/')",
        "open('file', 'w')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.execv('/bin/true', ['true'])",
        "import resource, os; resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (5, 5))",
        "x = bytearray(8 << 30)",
        "def f(): f()\nf()",
        "assert input()",
        "open('/proc/self/environ').read()",
        "import socket; socket.socketpair()",
        "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, 9)",
    ],
)
def test_wrong_and_hostile_programs_fail(sandbox: Sandbox, program: str) -> None:
    assert not sandbox.run(program, 10)


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="numbers of x86-64")
@pytest.mark.parametrize(
    "number", ["57", "58", "41, 2, 1, 0", "425, 8, 0", "435, 0, 0", "1073741881", "56, 17", "294, 0"]
)
def test_system_calls_are_refused_below_the_library_too(sandbox: Sandbox, number: str) -> None:
    assert not sandbox.run(CALL.format(number), 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["while True: print('x' * 1000)", "import time; time.sleep(600)", "while True: pass"]
)
def test_programs_that_do_not_end_are_ended(
    sandbox: Sandbox, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_START", 0.0)
    assert not sandbox.run(program, 0.5)


def test_the_host_is_unchanged(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the user, connections of both kinds, and the environment."""
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    before = secret.stat()
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        for one in (tcp, udp):
            one.bind(("127.0.0.1", 0))
            one.settimeout(0)
        tcp.listen()
        here = f"('127.0.0.1', {tcp.getsockname()[1]})"
        there = f"('127.0.0.1', {udp.getsockname()[1]})"
        attempts = (
            f"open({str(secret)!r}).read()",
            f"open({str(secret)!r}, 'w')",
            f"open({str(tmp_path / 'new')!r}, 'w')",
            f"import os; os.remove({str(secret)!r})",
            f"import os; os.chmod({str(secret)!r}, 0o777)",
            f"import os; os.utime({str(secret)!r}, (0, 0))",
            f"import os; os.truncate({str(secret)!r}, 0)",
            f"import os; os.symlink('/etc', {str(tmp_path / 'link')!r})",
            f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
            f"import os; os.listdir({str(Path.home())!r})",
            f"import socket; socket.create_connection({here})",
            f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', {there})",
            "import os; assert 'HF_TOKEN' in os.environ",
        )
        assert [attempt for attempt in attempts if sandbox.run(attempt, 10)] == []
        with pytest.raises(BlockingIOError):
            tcp.accept()
        with pytest.raises(BlockingIOError):
            udp.recv(10)
    assert secret.read_text() == "secret" and os.listdir(tmp_path) == ["secret"]
    after = secret.stat()
    for field in ("st_mode", "st_size", "st_mtime_ns", "st_uid"):
        assert getattr(after, field) == getattr(before, field)


def test_a_system_without_confinement_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="--sandbox none"):
        Sandbox.open()


def test_a_probe_that_escapes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limits alone the probe can read a file, so the sandbox must not be opened."""
    whole = runner._task

    def weak(program: str, seconds: float, mode: runner.Mode) -> dict[str, object]:
        return {key: value for key, value in whole(program, seconds, mode).items() if key != "linux"}

    monkeypatch.setattr(runner, "_task", weak)
    monkeypatch.setattr(runner, "_refuse_unknown_system", lambda: None)
    if sys.platform == "linux":
        with pytest.raises(SandboxError, match="not stopped"):
            Sandbox.open()


def test_a_kernel_without_landlock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("Landlock is a part of Linux")
    whole = runner._task

    def without(program: str, seconds: float, mode: runner.Mode) -> dict[str, object]:
        task = whole(program, seconds, mode)
        if mode == "auto":
            task["linux"] = {**task["linux"], "filter": [(0xFFFF, 0, 0, 0)]}
        return task

    monkeypatch.setattr(runner, "_task", without)
    with pytest.raises(SandboxError, match="seccomp"):
        Sandbox.open()


@pytest.mark.skipif(
    not Path("/usr/include/asm-generic/unistd.h").is_file(), reason="no headers of the kernel"
)
@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_numbers_of_the_system_calls_are_the_kernels(machine: str) -> None:
    headers = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }
    if not Path(headers[machine]).is_file():
        pytest.skip("no headers of the kernel")
    text = Path(headers[machine]).read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    column = list(ARCHITECTURES).index(machine)
    ours = {name: numbers[column] for name, numbers in REFUSED.items() if numbers[column] is not None}
    ours |= {"clone": CLONE[column], "tgkill": TGKILL[column], "prlimit64": PRLIMIT[column], **ALLOWED_NEW}
    ours["fcntl"] = FCNTL[column]
    assert {name: number for name, number in ours.items() if known.get(name, number) != number} == {}
    assert len(ours.keys() & known.keys()) > 60


def test_the_profile_of_macos_quotes_paths() -> None:
    profile = macos.profile('/opt/a "b"/python', ["/usr/lib"], "/Users/me")
    assert '(literal "/opt/a \\"b\\"/python")' in profile
    assert profile.count("(") == profile.count(")")
