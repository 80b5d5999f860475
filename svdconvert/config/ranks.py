"""Who is who when several processes share one output (torchrun, accelerate launch)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from svdconvert.errors import RecipeError, SvdConvertError

_LOST = "another rank died, so this one stops; run the same command again to go on"


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    index: int = 0
    count: int = 1
    local: int = 0
    """Index on this host: which GPU is this process's own."""

    @property
    def leads(self) -> bool:
        """True in the one process that lays out, finishes and reports."""
        return self.index == 0

    def alone(self, verb: str) -> "Ranks":
        """This, where it is the only process. Raises RecipeError for a verb that does not share its work."""
        if self.count > 1:
            raise RecipeError(f"{verb} runs in one process; start it without torchrun or accelerate launch")
        return self

    def wait(self) -> None:
        """Wait until every rank is here. Raises SvdConvertError where one of them died."""
        if self.count == 1:
            return
        import torch

        try:
            torch.distributed.barrier()
        except RuntimeError as error:
            raise SvdConvertError(_LOST) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what the ranks do with each other. Raises SvdConvertError where one of them died."""
        try:
            yield
        except RuntimeError as error:
            # gloo speaks of the peer; NCCL's errors have a class of their own.
            if self.count == 1 or not ("peer" in str(error) or "Dist" in type(error).__name__):
                raise
            raise SvdConvertError(_LOST) from error


def find_ranks() -> Ranks:
    """The ranks that the launcher started, through accelerate.

    Raises RecipeError where fewer run than were asked for.
    """
    _refuse_missing(int(os.environ.get("WORLD_SIZE", "1")))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    # A rank may wait long for a slower one; that a rank died is seen at once from its closed connection.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    return Ranks(state.process_index, state.num_processes, state.local_process_index)


def _refuse_missing(running: int) -> None:
    """`accelerate launch --num_processes N` starts a single process on some CPU set-ups, silently."""
    asked = _asked_for()
    if asked > running:
        raise RecipeError(
            f"{asked} ranks were asked for and {running} runs; on CPU start them with "
            f"torchrun --nproc_per_node {asked} -m svdconvert ..."
        )


def _asked_for() -> int:
    """The number of processes on the command line of the launcher above this process."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return 1
    import psutil

    words: list[str] = psutil.Process(os.getppid()).cmdline()
    for flag in ("--num_processes", "--num-processes"):
        for place, word in enumerate(words):
            if word == flag and place + 1 < len(words) and words[place + 1].isdigit():
                return int(words[place + 1])
            if word.startswith(flag + "=") and word.split("=", 1)[1].isdigit():
                return int(word.split("=", 1)[1])
    return 1
