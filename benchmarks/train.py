"""Compare training steps with PEFT in a plain loop, with the Trainer of transformers, and with dense SORSA.

    python benchmarks/train.py --model DIR --data FILE [--steps 8] [--repeat 3] [--only step|memory]

`step` runs every contender in a separate process, in turn, on the same rows with the same adapter shapes
and precision. It prints medians of the processor time of a step, which a busy machine disturbs less than
elapsed time, and the ratios of neighbouring runs. `memory` lists the activations that are saved for the
backward pass of one row of 1024 tokens, tensor by tensor, for lora and for lora-fa.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

from measure import Measured, in_turn, peak, run
from rich.console import Console
from rich.table import Table

CONTENDERS = {
    "lora": ("svdconvert", "peft", "trainer"),
    "pissa": ("svdconvert", "peft", "trainer"),
    "lora-fa": ("svdconvert",),
    "sorsa": ("svdconvert", "dense"),
}
HERE = Path(__file__).parent
console = Console()


def main() -> None:
    """Run both parts, or the one that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a directory with a bf16 model and its tokenizer")
    parser.add_argument("--data", required=True, help="training data, as for svdconvert train")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default=",".join(CONTENDERS))
    parser.add_argument("--only", choices=("step", "memory"))
    arguments = parser.parse_args()
    if arguments.only != "memory":
        steps(arguments)
    if arguments.only != "step":
        memory(arguments)


def steps(arguments: argparse.Namespace) -> None:
    """Print a table of step times and peak memory."""
    table = Table(
        "method",
        "who",
        "processor time of a step",
        "svdconvert's share",
        "peak memory",
        "loss of the last step",
    )
    for method in arguments.methods.split(","):
        runs = {who: partial(_child, arguments, method, who) for who in CONTENDERS[method]}
        found = in_turn(runs, arguments.repeat)
        times = {who: [_said(each)["step"] for each in measured] for who, measured in found.items()}
        for who, measured in found.items():
            shares = [mine / theirs for mine, theirs in zip(times["svdconvert"], times[who], strict=True)]
            table.add_row(
                method,
                who,
                f"{statistics.median(times[who]):.2f} s",
                f"{statistics.median(shares):.2f}",
                f"{peak(measured) / 1e6:.0f} MB",
                f"{_said(measured[-1])['loss']:.4f}",
            )
    console.print(table)


def _child(arguments: argparse.Namespace, method: str, who: str) -> Measured:
    passed = ("model", "data", "steps", "batch_size", "rank", "max_length", "precision")
    values = {name: getattr(arguments, name) for name in passed} | {"method": method}
    command = [sys.executable, HERE / "training" / "step.py", who, json.dumps(values)]
    return run(command, threads=arguments.threads)


def _said(measured: Measured) -> dict[str, float]:
    return json.loads(measured.output.splitlines()[-1])


def memory(arguments: argparse.Namespace) -> None:
    """Print tables of what is saved for the backward pass."""
    values = {"model": arguments.model, "rank": arguments.rank, "precision": arguments.precision}
    command = [sys.executable, HERE / "training" / "activations.py", json.dumps(values)]
    console.print(run(command, threads=arguments.threads).output)


if __name__ == "__main__":
    main()
