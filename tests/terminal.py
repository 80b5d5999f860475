"""The program in a pseudo-terminal, and what a person sees there."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.process import PROGRAM, ROOT

_PATIENCE = 120.0  # seconds
_PIECE = re.compile(r"\x1b\[(?P<number>[0-9;?]*)(?P<code>[A-Za-z])|(?P<text>[^\x1b])", re.DOTALL)


@dataclass
class Screen:
    """A terminal of unlimited height: what is on it, and every line that was ever drawn."""

    columns: int
    lines: list[str] = field(default_factory=lambda: [""])
    row: int = 0
    column: int = 0
    drawn: list[str] = field(default_factory=list)
    """The content of a line whenever the cursor left it or it was erased."""
    output: str = ""
    """What the program wrote; a line that only the terminal wraps is one line in it, which can be copied."""

    def feed(self, output: str) -> None:
        """Write what a program has written."""
        self.output += output
        for piece in _PIECE.finditer(output):
            if piece["text"] is None:
                self._control(piece["code"], piece["number"])
            elif piece["text"] == "\n":
                self._leave()
                self.row += 1
            elif piece["text"] == "\r":
                self.column = 0
            else:
                self._put(piece["text"])
            while self.row >= len(self.lines):
                self.lines.append("")
        self._leave()

    def _leave(self) -> None:
        if line := self.lines[self.row].rstrip():
            self.drawn.append(line)

    def _control(self, code: str, number: str) -> None:
        if code == "K":
            self._leave()
            self.lines[self.row] = self.lines[self.row][: 0 if number == "2" else self.column]
        elif code == "A":
            self._leave()
            self.row = max(0, self.row - int(number or 1))

    def _put(self, character: str) -> None:
        if self.column >= self.columns:  # the terminal itself wraps, in the middle of a word
            self._leave()
            self.row += 1
            self.column = 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
        self.column += 1

    @property
    def left(self) -> list[str]:
        """The lines that stay."""
        return [line.rstrip() for line in self.lines if line.strip()]


def start_on_terminal(
    words: Sequence[object], columns: int, home: Path, environment: Mapping[str, str] | None = None
) -> tuple["subprocess.Popen[bytes]", int]:
    """Start a command in a terminal of so many columns; (process, the other end of its terminal)."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [*PROGRAM, *map(str, words)],
        cwd=home,
        env={**inherited, **own, **(environment or {})},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(follower)
    return process, leader


def _take_terminal() -> None:
    """Make the terminal that of the process, so that Ctrl-C in it is a signal to the process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 1 << 16)
    except OSError:  # how Linux says that nobody has the terminal open any more
        return b""


def on_terminal(
    words: Sequence[object], columns: int, *, home: Path, environment: Mapping[str, str] | None = None
) -> tuple[int, Screen]:
    """Run a command in a terminal; (exit status, the screen)."""
    process, leader = start_on_terminal(words, columns, home, environment)
    output = bytearray()
    while chunk := _read(leader):
        output += chunk
    os.close(leader)
    screen = Screen(columns)
    screen.feed(output.decode(errors="replace"))
    return process.wait(timeout=60), screen


class Session:
    """A command in a terminal, to which a person types; a context manager."""

    def __init__(self, words: Sequence[object], home: Path) -> None:
        self._process, self._leader = start_on_terminal(words, 80, home)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.all = ""
        """Everything that appeared."""
        self._seen = 0

    def _more(self) -> None:
        ready, _, _ = select.select([self._leader], [], [], _PATIENCE)
        chunk = _read(self._leader) if ready else b""
        assert chunk, f"nothing more came after {self.all[self._seen :]!r}"
        self.all += self._decoder.decode(chunk).replace("\r\n", "\n")

    def wait_for(self, words: str) -> None:
        """Return when `words` have appeared after what was waited for before."""
        while (place := self.all.find(words, self._seen)) < 0:
            self._more()
        self._seen = place + len(words)

    def wait_for_more(self, count: int) -> None:
        """Return when so many more characters have appeared."""
        while len(self.all) < self._seen + count:
            self._more()
        self._seen = len(self.all)

    def send(self, text: str) -> None:
        """Type."""
        os.write(self._leader, text.encode())

    def interrupt(self, words: str) -> None:
        """Press Ctrl-C at a prompt, until `words` have appeared.

        One that comes after the prompt is shown and before Python reads waits for the next key.
        """
        for _ in range(20):
            self.send("\x03")
            while select.select([self._leader], [], [], 3)[0]:
                self._more()
                if words in self.all[self._seen :]:
                    return self.wait_for(words)
        raise AssertionError(f"no Ctrl-C brought {words!r} after {self.all[self._seen :]!r}")

    def ended(self) -> int:
        """The exit status, when the command has ended."""
        while chunk := _read(self._leader):
            self.all += self._decoder.decode(chunk).replace("\r\n", "\n")
        return self._process.wait(timeout=_PATIENCE)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._leader)
