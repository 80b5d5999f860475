"""Standard output and error. Text from files is made safe to print here and nowhere else.

Names of tensors, directories and models come from files that anybody may have written. `plain` makes control
characters visible; rich markup is only interpreted in svdconvert's own text.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.text import Text

from svdconvert.cli.wording import as_typed
from svdconvert.config.display import visible
from svdconvert.errors import OutputError
from svdconvert.hub.auth import scrub

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(highlight=False, soft_wrap=True, stderr=True)

_NARROWEST = 20  # characters that a line has even on a narrower terminal


def plain(value: object) -> str:
    """`value` as one line of text: control and format characters as escapes, such as \\x1b and \\n."""
    return visible(str(value))


def say(sentence: str) -> None:
    """Print one line on standard error, with options as they are typed and without any Hub token."""
    stderr.print(Text(wrapped(f"svdconvert: {plain(scrub(as_typed(sentence)))}", stderr)))


def wrapped(sentence: str, console: Console, indent: int = 0) -> str:
    """The sentence with line breaks at spaces if `console` is a terminal; later lines have `indent` spaces.

    A word that is longer than a line, such as an address, stays whole.
    """
    return _lines(sentence, console, indent) if console.is_terminal else sentence


def folded(sentence: str, indent: int) -> str:
    """The sentence with line breaks for standard output, also if that is no terminal, as in a table."""
    return _lines(sentence, stdout, indent)


def _lines(sentence: str, console: Console, indent: int) -> str:
    width = max(console.width - indent, _NARROWEST)
    lines = wrap(sentence, width, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines)


def notify(sentence: str) -> None:
    """Print one line on standard error, from the leading rank only."""
    if leads():
        say(sentence)


def leads() -> bool:
    """False in a rank that leaves reporting to the leading one; every rank reports its own errors."""
    return os.environ.get("RANK", "0") == "0"


def as_json(value: Any) -> None:
    """Print one JSON document on standard output. Raises OutputError if that is closed or full."""
    text = json.dumps(value, indent=2, default=str) + "\n"
    with standard_output():
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def standard_output() -> Iterator[None]:
    """A context for writing to standard output. Raises OutputError if that is closed or full."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"standard output cannot be written ({reason}); the work itself is done") from error
