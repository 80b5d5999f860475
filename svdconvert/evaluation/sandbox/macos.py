"""Confinement on macOS: `sandbox-exec`, which is marked as deprecated, and which Bazel and Nix use too."""

from collections.abc import Sequence
from pathlib import Path

PROGRAM = "/usr/bin/sandbox-exec"
LAYERS = ("sandbox-exec: no network, no writing, no other programs, no files of the user",)


def command(python: str, readable: Sequence[str]) -> list[str]:
    """What to put in front of the command of a Python process."""
    return [PROGRAM, "-p", profile(python, readable, str(Path.home()))]


def profile(python: str, readable: Sequence[str], home: str) -> str:
    """Rules of the sandbox; of several that apply, the last one decides."""
    allowed = " ".join(f"(subpath {_quoted(path)})" for path in readable)
    return "\n".join(
        (
            "(version 1)",
            "(allow default)",
            "(deny network*)",
            "(deny file-write*)",
            '(allow file-write* (literal "/dev/null"))',
            f'(deny file-read* (subpath {_quoted(home)}) (subpath "/Users") (subpath "/Volumes"))',
            f"(allow file-read* {allowed})",
            "(deny process-fork)",
            "(deny process-exec*)",
            f"(allow process-exec* (literal {_quoted(python)}))",
            "(deny signal)",
            "(allow signal (target self))",
            "(deny mach-priv*)",
            "(deny system*)",
        )
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
