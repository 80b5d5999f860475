"""How a command runs, as opposed to what it writes."""

from collections.abc import Callable
from dataclasses import dataclass

from svdconvert.config.progress import Track, ignore_progress
from svdconvert.config.ranks import Ranks
from svdconvert.config.shard_sink import ShardSink


def ignore_message(sentence: str) -> None:
    """The default of `Run.notify`: discard the message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The execution settings of one command. Only `threads` and `device` may change bytes of the result."""

    overwrite: bool = False
    """Replace an output directory that svdconvert wrote."""
    threads: int | None = None
    """Threads of the arithmetic; the same number gives the same bytes. None: as many as torch chooses."""
    device: str = "auto"
    """Device of the arithmetic: cpu, cuda, cuda:N, or auto."""
    stream: bool = False
    """Read the weights of a model of the Hub by range requests instead of downloading them."""
    shard_sink: ShardSink | None = None
    """Uploads finished shards at once; the output directory does not appear then."""
    trust_remote_code: bool = False
    """Let transformers run code from the model's repository."""
    ranks: Ranks = Ranks()
    """The processes that share the work; see `find_ranks`."""
    track: Track = ignore_progress
    """Called with the progress of every phase, sometimes from another thread; see `Progress`. An exception
    that it raises stops the command like any failure: what is finished stays in the unfinished output, from
    which the same call continues."""
    notify: Callable[[str], None] = ignore_message
    """Called with a sentence that the user should read at once."""
