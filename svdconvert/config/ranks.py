"""The processes (ranks) that share one output, started by torchrun or accelerate launch."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

from svdconvert.errors import RecipeError, SvdConvertError

_LONGEST_START = 600.0  # seconds within which all ranks must have started
_NEVER = timedelta(days=7)
_POLL = 0.02  # seconds between two looks at something that torch would wait for without heeding signals
_LOST = "another rank died, so this one stops; run the same command again to continue"


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process as one of several ranks."""

    index: int = 0
    count: int = 1
    local: int = 0
    """Index on this host, which is also the index of its GPU."""

    @property
    def leads(self) -> bool:
        """True in the one process that lays out files, completes the output and reports."""
        return self.index == 0

    def alone(self, command: str) -> "Ranks":
        """`self` if it is the only process, for commands that do not share work. Raises RecipeError."""
        if self.count > 1:
            raise RecipeError(
                f"{command} runs in one process; start it without torchrun or accelerate launch"
            )
        return self

    def wait(self) -> None:
        """Wait for every rank. Raises SvdConvertError if one of them died."""
        if self.count == 1:
            return
        import torch

        try:
            work = torch.distributed.barrier(async_op=True)
            while not work.is_completed():
                time.sleep(_POLL)
            work.wait()
        except RuntimeError as error:
            raise SvdConvertError(_LOST) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context for communication between ranks. Raises SvdConvertError if one of them died."""
        try:
            yield
        except RuntimeError as error:
            # gloo's messages contain "peer"; NCCL raises DistBackendError.
            if self.count == 1 or not ("peer" in str(error) or "Dist" in type(error).__name__):
                raise
            raise SvdConvertError(_LOST) from error


def find_ranks() -> Ranks:
    """This process's rank among those that the launcher started.

    Raises RecipeError if fewer ranks run than `accelerate launch` should start or if the launcher's variables
    are incomplete, SvdConvertError if the other ranks do not start within ten minutes.
    """
    count = _number("WORLD_SIZE", 1)
    _refuse_missing(count)
    if count == 1:
        return Ranks()
    import torch
    from accelerate import PartialState

    for variable in ("RANK", "MASTER_PORT"):
        _number(variable)
    store = None if torch.distributed.is_initialized() else _meet(_number("RANK"), count)
    # A rank may wait long for a slower one. The death of a rank closes its connection and is noticed at once.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_NEVER)
    del store  # rank 0 serves it, and the process group connects to the same one
    return Ranks(state.process_index, state.num_processes, state.local_process_index)


def _number(variable: str, default: int | None = None) -> int:
    """The number in a variable of the launcher. Raises RecipeError if it is none."""
    text = os.environ.get(variable, "" if default is None else str(default))
    if not text.isdecimal():
        raise RecipeError(
            f"WORLD_SIZE announces several processes, but {variable} is {text or 'not set'!r}; start them "
            "with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    return int(text)


def _meet(rank: int, count: int) -> Any:
    """Wait until all ranks have started; the store through which they know that.

    torch's own wait heeds no signal, so it is left to a thread, which is not joined: a signal at a bad moment
    makes Python's `join` raise a RuntimeError. Raises SvdConvertError after ten minutes.
    """
    found: list[Any] = []
    deadline = time.monotonic() + _LONGEST_START
    Thread(target=_connect, args=(found,), daemon=True).start()
    while not found and time.monotonic() < deadline:
        time.sleep(_POLL)
    store = found[0] if found else None
    keys = [f"svdconvert/{number}" for number in range(count)]
    try:
        if store is not None:
            store.set(keys[rank], "here")
        while time.monotonic() < deadline and store is not None:
            if store.check(keys):
                return store
            time.sleep(_POLL)
    except RuntimeError as error:
        raise SvdConvertError(_LOST) from error
    raise SvdConvertError(
        f"rank {rank} of {count} waited {_LONGEST_START:.0f} seconds for the others, which did not start; "
        "check the launcher's command on every machine, and that MASTER_ADDR and MASTER_PORT can be reached"
    )


def _connect(found: list[Any]) -> None:
    """Connect to the store that the launcher or rank 0 serves, and put it into `found`, or None."""
    from torch.distributed.rendezvous import rendezvous

    store = None
    try:
        with suppress(RuntimeError):  # the launcher ended
            store = next(rendezvous("env://", timeout=_NEVER))[0]
    finally:
        found.append(store)


def _refuse_missing(running: int) -> None:
    """Raise RecipeError if `accelerate launch --num_processes N` started one process, as it may on a CPU."""
    requested = _requested_ranks()
    if requested > running:
        raise RecipeError(
            f"{requested} ranks were requested and {running} runs; on a CPU start them with "
            f"torchrun --nproc_per_node {requested} -m svdconvert ..."
        )


def _requested_ranks() -> int:
    """--num_processes on the command line of `accelerate launch`, our parent process; 1 if that is unknown.

    Linux alone shows that command line as a file.
    """
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or not parent.exists():
        return 1
    words = parent.read_bytes().decode(errors="replace").split("\0")
    for flag in ("--num_processes", "--num-processes"):
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word == flag and following.isdigit():
                return int(following)
            if word.startswith(flag + "=") and word.split("=", 1)[1].isdigit():
                return int(word.split("=", 1)[1])
    return 1
