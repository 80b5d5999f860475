"""Fetching a model's files from the disk before anything asks for them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

_PIECE, _AT_ONCE = 1 << 20, 16  # bytes, and how many such pieces one call to the system fetches
_MOST = 4 << 30  # bytes: no disk gives more in the second that is waited for


@contextmanager
def fetched_meanwhile(model: Path) -> Iterator[None]:
    """Within it, a directory's weights (or one file) are read into the system's cache, in the order of names.

    For the second that the import of torch takes, on one core and with the disk idle. What cannot be read is
    left for those to complain of who need it.
    """
    stop = Event()
    Thread(target=_fetch, args=(model, stop), name="fetch", daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _fetch(model: Path, stop: Event) -> None:
    room, left = bytearray(_PIECE), _MOST  # all pieces one over the other: what counts is that they were read
    with suppress(OSError):
        for path in [model] if model.is_file() else sorted(model.glob("model*.safetensors")):
            with path.open("rb", buffering=0) as file:
                offset = 0
                while left > 0 and not stop.is_set():
                    count = os.preadv(file.fileno(), [room] * _AT_ONCE, offset)
                    offset, left = offset + count, left - count
                    if count == 0:
                        break
