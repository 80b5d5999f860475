"""The program in a pseudo-terminal, and what a person sees there."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.process import PROGRAM, ROOT

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

    def feed(self, output: str) -> None:
        """Write what a program has written."""
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


def on_terminal(
    words: Sequence[object], columns: int, *, home: Path, environment: Mapping[str, str] | None = None
) -> tuple[int, Screen]:
    """Run a command in a terminal of so many columns; (exit status, the screen)."""
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
    )
    os.close(follower)
    output = bytearray()
    while True:
        try:
            chunk = os.read(leader, 1 << 16)
        except OSError:  # how Linux says that nobody has the terminal open any more
            break
        if not chunk:
            break
        output += chunk
    os.close(leader)
    screen = Screen(columns)
    screen.feed(output.decode(sys.getdefaultencoding(), "replace"))
    return process.wait(timeout=60), screen
