"""The processes (ranks) that share one output, started by torchrun or accelerate launch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from svdconvert.errors import RecipeError, SvdConvertError

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
            torch.distributed.barrier()
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

    Raises RecipeError if fewer ranks run than `accelerate launch` should start.
    """
    _refuse_missing(int(os.environ.get("WORLD_SIZE", "1")))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    # A rank may wait long for a slower one. The death of a rank closes its connection and is noticed at once.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    return Ranks(state.process_index, state.num_processes, state.local_process_index)


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
