"""SIGINT and SIGTERM raise exceptions, so that a command can close its files and report what it leaves."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import NoReturn


class TerminatedError(BaseException):
    """Raised on SIGTERM, which schedulers and launchers send."""


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and TerminatedError on SIGTERM, in the main thread.

    A signal that the parent process has set to be ignored (a background job) stays ignored.
    """
    if current_thread() is not main_thread():
        yield  # Python allows handlers in the main thread only
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else TerminatedError
