"""How a verb runs, as opposed to what it makes."""

from collections.abc import Callable
from dataclasses import dataclass

from svdconvert.config.progress import Track, ignore_progress
from svdconvert.config.ranks import Ranks
from svdconvert.config.shard_sink import ShardSink


def ignore_message(sentence: str) -> None:
    """The default of `Run.notify`: discard the message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The circumstances of one command."""

    overwrite: bool = False
    """Replace an output directory that svdconvert wrote."""
    threads: int | None = None
    """Threads of the arithmetic; bytes are repeatable at a fixed count. None: as torch chooses."""
    device: str = "auto"
    """Where the arithmetic runs: cpu, cuda, cuda:N, or auto."""
    stream: bool = False
    """Leave the weights of a model of the Hub where they are, and read them from there."""
    shard_sink: ShardSink | None = None
    """Where finished shards go at once; the output directory does not appear then."""
    trust_remote_code: bool = False
    """Let transformers run code that a model brings."""
    ranks: Ranks = Ranks()
    """The processes that share the work; see `find_ranks`."""
    track: Track = ignore_progress
    """Told of every finished tensor."""
    notify: Callable[[str], None] = ignore_message
    """Told in a sentence what a user should know at once."""
