"""One line of progress: phase, amount, rate, time left and facts, fitted to a width without cut numbers."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from svdconvert.cli.terminal import plain
from svdconvert.config.progress import Fact, Progress
from svdconvert.config.sizes import size_text

_BAR = 12  # characters
_SHORTEST_NAME = 10
_WINDOW = 64  # reports that a rate is a mean over
_SPACING = 0.25  # seconds between two of them

# Fact -> how it is written, in the order in which facts give way when a terminal is narrow, the last first.
_FACTS: dict[str, Callable[[Fact], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "held_out": lambda value: f"held-out {value:.4f}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "lr": lambda value: f"lr {value:.2e}",
}


@dataclass
class Meter:
    """The rate of one phase, over its last reports; the clock stands still while other phases run."""

    done: int = 0
    clock: float = 0.0
    """Seconds of this phase."""
    since: float | None = None
    """When the clock was last read; None while it stands still."""
    samples: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def advance(self, now: float, done: int) -> None:
        """Note that `done` is reached; a smaller number than before is a new start."""
        if done < self.done:
            self.clock = 0.0
            self.samples.clear()
        elif self.since is not None:
            self.clock += now - self.since
        self.since = now
        self.done = done
        if not self.samples or self.clock - self.samples[-1][0] >= _SPACING:
            self.samples.append((self.clock, done))

    def pause(self, now: float) -> None:
        """Stop the clock."""
        if self.since is not None:
            self.clock += now - self.since
        self.since = None

    def elapsed(self, now: float) -> float:
        """Seconds that the phase has taken so far."""
        return self.clock + (now - self.since if self.since is not None else 0.0)

    def rate(self) -> float | None:
        """Units per second; None until it can be known."""
        if not self.samples:
            return None
        clock, done = self.samples[0]
        seconds = self.clock - clock
        return (self.done - done) / seconds if seconds > 0 and self.done > done else None


def progress_text(progress: Progress, meter: Meter, now: float, width: int | None = None) -> str:
    """The line, at most `width` characters; without a width a sentence with commas, for a log file."""
    left = _time_left(progress, meter)
    facts = _facts(progress, meter)
    head = plain(progress.phase)
    amount = _amount(progress) or f"{_clock(meter.elapsed(now))} so far"
    if width is None:
        return f"{head} {', '.join([amount, *facts, *left])}"
    optional = [*left, *facts]
    bar = [_bar(progress)] if progress.total else []
    # What gives way on a narrow terminal: the learning rate, the bar, then all else from the end.
    while _width([head, *bar, amount, *optional]) > width and (bar or optional):
        if optional and (optional[-1].startswith("lr ") or not bar):
            optional.pop()
        else:
            bar = []
    return _with_name(" ".join([head, *bar]), "  ".join([amount, *optional]), progress, width)


def _width(parts: list[str]) -> int:
    return len("  ".join(parts))


def _with_name(head: str, rest: str, progress: Progress, width: int) -> str:
    line = f"{head} {rest}"[:width]
    name = plain(" ".join(str(progress.facts[key]) for key in ("name", "file") if progress.facts.get(key)))
    room = width - len(line) - 2
    if not name or room < _SHORTEST_NAME:
        return line
    return f"{line}  {name if len(name) <= room else name[: room - 1] + '…'}"


def _facts(progress: Progress, meter: Meter) -> list[str]:
    known = [write(progress.facts[name]) for name, write in _FACTS.items() if name in progress.facts]
    rate = meter.rate()
    if rate is None or "tokens_per_second" in progress.facts or not progress.unit:
        return known
    shown = size_text(int(rate)) if progress.unit == "bytes" else f"{_short(rate)} {progress.unit}"
    return [f"{shown}/s", *known]


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _amount(progress: Progress) -> str:
    if not progress.unit:
        return ""
    if progress.unit == "bytes":
        unit, scale = _scale(progress.total or progress.done)
        of = "" if progress.total is None else f"/{progress.total / scale:.1f}"
        return f"{progress.done / scale:.1f}{of} {unit}"
    of = "" if progress.total is None else f"/{progress.total:,}"
    return f"{progress.done:,}{of} {progress.unit}"


def _scale(nbytes: float) -> tuple[str, int]:
    units = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
    return next(((unit, scale) for unit, scale in units if nbytes >= scale), ("bytes", 1))


def _bar(progress: Progress) -> str:
    share = min(1.0, progress.done / progress.total) if progress.total else 0.0
    full = int(share * _BAR)
    return "━" * full + "╌" * (_BAR - full)


def _time_left(progress: Progress, meter: Meter) -> list[str]:
    rate = meter.rate()
    if rate is None or progress.total is None or progress.done >= progress.total:
        return []
    return [f"{_clock((progress.total - progress.done) / rate)} left"]


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours = whole // 3600
    minutes = whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
