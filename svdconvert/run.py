"""How a verb runs, as opposed to what it makes."""

from dataclasses import dataclass

from svdconvert.progress import Track, silent


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The circumstances of one command."""

    overwrite: bool = False
    """Replace an output directory that svdconvert wrote."""
    threads: int | None = None
    """Threads of the arithmetic; bytes are repeatable at a fixed count. None: as torch chooses."""
    device: str = "auto"
    """Where the arithmetic runs: cpu, cuda, cuda:N, or auto."""
    track: Track = silent
    """Told of every finished tensor."""
