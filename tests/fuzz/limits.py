"""What one input may take (time, memory) and may do (nothing but read): more is a failure, not a refusal."""

import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.constants import HF_HOME

SECONDS = 10
"""Time of the processor for one input. On a machine with other work an input takes longer by the clock."""
MEMORY = 400 << 20
"""Bytes of memory for one input, in addition to those that the process has."""
_ADDRESSES = 4 << 30
"""Bytes of addresses for one input: an allocation of more fails at once, even if nothing would be stored."""
_LONGEST = 200
"""Seconds after which the process is ended if not even the alarm is noticed, as in a loop of a C library.

The input is then left in its directory, and the traceback in the file `hang` next to that."""
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen")
_CONNECTING = ("socket.connect", "socket.getaddrinfo")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_STATUS = Path("/proc/self/status")


class BeyondLimitError(BaseException):
    """An input took too long, took too much memory, or did more than to be read."""


_watched: list[Path] = []
"""The directory of the input that is being read; empty between two inputs."""


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if not _watched:
        return
    if event in _FORBIDDEN or event in _CONNECTING:
        raise BeyondLimitError(f"{event} {arguments!r}")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        place = os.fspath(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        path = os.path.abspath(os.fsdecode(place))
        if "__pycache__" in path or path.startswith(HF_HOME):
            return  # written at the first use of a library, whatever the input is
        if place and not Path(path).is_relative_to(_watched[0]) and path != os.devnull:
            raise BeyondLimitError(f"{path} was opened for writing")


sys.addaudithook(_watch)


@contextmanager
def limited(directory: Path) -> Iterator[None]:
    """A context in which one input is read, which may write below `directory` only.

    Raises BeyondLimitError if more than SECONDS or MEMORY is used, also if the MemoryError was caught.
    """
    addresses = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _stop)
    hang = directory.with_name("hang").open("w")
    faulthandler.dump_traceback_later(_LONGEST, exit=True, file=hang)
    _reset_peak()
    held = _kilobytes("VmRSS") << 10
    resource.setrlimit(resource.RLIMIT_AS, ((_kilobytes("VmSize") << 10) + _ADDRESSES, addresses[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _watched.append(directory)
    try:
        yield
    except BaseException as error:
        if _is_memory_error(error):
            raise BeyondLimitError("an allocation of gigabytes was attempted") from error
        raise
    finally:
        _watched.clear()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, addresses)
        faulthandler.cancel_dump_traceback_later()
        hang.close()
    if (_kilobytes("VmHWM") << 10) - held > MEMORY:
        raise BeyondLimitError(f"more than {MEMORY} bytes of memory were used")


def _stop(*_: object) -> None:
    raise BeyondLimitError(f"it was not finished after {SECONDS} seconds")


def _is_memory_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError | RuntimeError) and _says_so(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _says_so(error: BaseException) -> bool:
    """True for what malloc refused: Python's error has no text, and torch's is a RuntimeError."""
    return not error.args if isinstance(error, MemoryError) else "can't allocate memory" in str(error)


def _kilobytes(name: str) -> int:
    """An entry of /proc/self/status; 0 on systems without it, where only the time is limited."""
    if not _STATUS.exists():
        return 0
    found = _STATUS.read_text().partition(f"{name}:")[2].split()
    return int(found[0])


def _reset_peak() -> None:
    """Make VmHWM start from the memory that is held now."""
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")
