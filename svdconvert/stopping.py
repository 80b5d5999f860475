"""Ctrl-C and SIGTERM: they end a command, and what it leaves is said."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import NoReturn, ParamSpec

P = ParamSpec("P")


class Terminated(BaseException):
    """SIGTERM, as a scheduler or a launcher sends it."""


_asked: list[BaseException] = []


@contextmanager
def stoppable() -> Iterator[None]:
    """Let both signals unwind the program: KeyboardInterrupt and Terminated.

    A signal that is ignored from outside, as in a job in the background, stays ignored.
    """
    if current_thread() is not main_thread():
        yield  # only the main thread may set handlers; there is none to set in a test's thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> NoReturn:
    _asked.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
    raise _asked[-1]


def heeding(told: Callable[P, None]) -> Callable[P, None]:
    """The same, and a signal that was lost is heeded: Python discards what is raised in a destructor."""

    def heed(*arguments: P.args, **named: P.kwargs) -> None:
        if _asked:
            raise _asked[-1]
        told(*arguments, **named)

    return heed
