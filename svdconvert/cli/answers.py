"""What a command answers with --json: one document, put together while the command runs.

A summary adds its facts by `tell`; `report_errors` opens the document and prints it, with the error if the
command fails. Without --json `tell` does nothing.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from svdconvert.cli.terminal import as_json, leads
from svdconvert.cli.terminal import notify as show_notice
from svdconvert.cli.wording import as_typed
from svdconvert.errors import OutputError
from svdconvert.hub.auth import scrub

_answer: ContextVar["Answer | None"] = ContextVar("answer", default=None)


class Answer:
    """The document of one command: an object of facts or, for a listing, a list of objects."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.rows: list[Any] | None = None
        self.notices: list[str] = []

    def print(self) -> None:
        """Print it. Raises OutputError if standard output is closed or full."""
        if self.rows is not None:
            _print(self.rows)
            return
        _print({**self.facts, "notices": self.notices})


@contextmanager
def answering(*, json: bool) -> Iterator[Answer | None]:
    """A context whose summaries go into one document instead of tables, if `json` asks for it."""
    answer = Answer() if json else None
    token = _answer.set(answer)
    try:
        yield answer
    finally:
        _answer.reset(token)


def wants_json() -> bool:
    """True if this command answers with a document, so nothing else may be printed on standard output."""
    return _answer.get() is not None


def tell(facts: Mapping[str, Any] | None = None, /, **more: Any) -> None:
    """Add facts to the document: numbers as numbers, sizes in bytes, shares as fractions, lists as lists."""
    if (answer := _answer.get()) is not None:
        answer.facts |= {**(facts or {}), **more}


def tell_rows(rows: list[Any]) -> None:
    """Make the document a list, for a command that lists."""
    if (answer := _answer.get()) is not None:
        answer.rows = rows


def notify(sentence: str) -> None:
    """Show a sentence that the user should read at once, and add it to the document."""
    show_notice(sentence)
    if (answer := _answer.get()) is not None:
        answer.notices.append(scrub(as_typed(sentence)))


def print_failure(sentence: str, status: int, answer: Answer | None = None) -> None:
    """Print the document of a command that fails: what it told so far, and the error."""
    facts = answer.facts if answer is not None else {}
    with suppress(OutputError, BrokenPipeError):
        _print({**facts, "error": {"message": scrub(as_typed(sentence)), "status": status}})


def _print(document: Any) -> None:
    if leads():
        as_json(finite(document))


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have, and for its dictionaries' keys texts."""
    if isinstance(value, Mapping):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
