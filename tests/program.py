"""The program as a user runs it, and what a refusal looks like."""

from collections.abc import Iterable
from pathlib import Path

from typer.testing import CliRunner

from svdconvert.cli.app import app


class Ended:
    """Exit status and output of a command."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err

    def __repr__(self) -> str:
        return f"status {self.status}\n{self.out}\n{self.err}"


def svdconvert(*arguments: object) -> Ended:
    """Run one command in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Ended(done.exit_code, done.stdout, done.stderr)


def succeeded(*arguments: object) -> Ended:
    """Run one command that must succeed."""
    ended = svdconvert(*arguments)
    assert ended.status == 0, ended
    return ended


def refused(*arguments: object, words: Iterable[object]) -> str:
    """Run one command that must exit with status 1 and one sentence with all `words`; return the sentence."""
    ended = svdconvert(*arguments)
    assert ended.status == 1, ended
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended
    assert lines[0].startswith("svdconvert: ")
    missing = [str(word) for word in words if str(word) not in lines[0]]
    assert missing == [], f"{missing} not in: {lines[0]}"
    return lines[0]


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, and every empty directory, with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in sorted(directory.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }
