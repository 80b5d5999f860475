"""A command that never ends, so that a kill always interrupts it.

`python -m tests.endless NAME SOURCE OUT` pauses after every tensor or step, and stops for
good after the last one.
"""

import sys
import time
from pathlib import Path

from svdconvert import (
    ConvertOptions,
    MergeOptions,
    Run,
    SplitOptions,
    TrainOptions,
    convert,
    decompose,
    merge,
    to_lora,
    train,
)
from svdconvert.config.progress import Progress

ENDLESS = [sys.executable, "-m", "tests.endless"]
COMMANDS = ("decompose", "train", "merge", "to-lora", "convert to hf", "convert to blinkdl")
STEPS = 40
"""Steps of training, with a checkpoint after each."""
_PAUSE = 0.02
"""Seconds after each tensor: some ten times what the one who kills needs to notice that it is finished."""


def write(name: str, source: Path, out: Path, run: Run) -> None:
    """Run one of COMMANDS with small shards."""
    if name == "decompose":
        decompose(source, out, SplitOptions(rank=8, max_shard_size="1MB"), run)
    elif name == "train":
        _train(source, out, run)
    elif name == "merge":
        merge(source, out, MergeOptions(max_shard_size="1MB"), run)
    elif name == "to-lora":
        to_lora(source, out, run=run)
    else:
        layout = name.removeprefix("convert to ")
        size = {} if layout == "blinkdl" else {"max_shard_size": "100KB"}  # a .pth is never split
        convert(source, out, ConvertOptions(layout=layout, **size), run)


def _train(source: Path, out: Path, run: Run) -> None:
    """Train on what a directory holds: start, which decompose wrote, and sums.jsonl."""
    options = TrainOptions(
        data=str(source / "sums.jsonl"),
        steps=STEPS,
        batch_size=2,
        max_length=48,
        dropout=0.1,
        precision="fp32",
        lr=1e-3,
        save_every=1,
    )

    def watch(log: object, steps: int) -> None:
        step = getattr(log, "step", 0)
        run.track(Progress(f"step {step}", "metrics.jsonl", step, steps))

    train(source / "start", out, options, run, watch=watch)


def _pause(progress: Progress) -> None:
    time.sleep(3600 if progress.done == progress.total else _PAUSE)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Run(device="cpu", threads=1, track=_pause))
