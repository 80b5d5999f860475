"""A command that never ends, so that a kill always interrupts it.

`python -m tests.endless NAME SOURCE OUT` pauses after every tensor or step, and stops for
good after the last one.
"""

import sys
import time
from pathlib import Path

from svdconvert import (
    CombineOptions,
    ConvertOptions,
    ExtractOptions,
    MergeOptions,
    Run,
    SplitOptions,
    TrainOptions,
    combine,
    convert,
    decompose,
    extract,
    merge,
    to_lora,
    train,
)
from svdconvert.config.progress import Progress

ENDLESS = [sys.executable, "-m", "tests.endless"]
COMMANDS = (
    "decompose",
    "train",
    "merge",
    "to-lora",
    "combine adapters",
    "combine checkpoints",
    "convert to hf",
    "convert to blinkdl",
    "extract",
)
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
    elif name == "combine adapters":
        combine([source, source], out, CombineOptions(method="ties", weights=(0.5, 2.0)), run)
    elif name == "combine checkpoints":
        options = CombineOptions(method="dare-linear", density=0.5, max_shard_size="1MB")
        combine([source / "one", source / "two"], out, options, run, base=str(source / "base"))
    elif name == "extract":
        extract(source / "base", source / "one", out, ExtractOptions(rank_budget=100), run)
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

    train(source / "start", out, options, run)


WRITING = ("combine", "convert", "decompose", "extract", "merge", "to-lora", "train")
"""The phases that write the output."""


def _pause(progress: Progress) -> None:
    if progress.phase in WRITING:
        time.sleep(3600 if progress.done == progress.total else _PAUSE)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Run(device="cpu", threads=1, track=_pause))
