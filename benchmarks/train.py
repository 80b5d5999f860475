"""Compare training steps with PEFT under transformers' Trainer and TRL's SFTTrainer, and with other loops.

    python benchmarks/train.py --model DIR --data FILE [--steps 8] [--repeat 3] [--only step|memory]

`step` runs every contender in a separate process, in turn, on the same batches with the same adapter shapes
and precision. It prints medians over the rounds of the seconds of a step (the slope after the second step,
elapsed and of the processor, which a busy machine disturbs less), and of the peak resident memory of the
process; the shares are medians of the ratios round by round. `--full-rows` joins the rows of FILE, so that
each has `--max-length` tokens and all are in the loss. TRL is installed into build/rival-trl on first use.
PEFT has no SORSA: there the trainers train LoRA. `memory` lists the activations that are saved for the
backward pass of one row of 1024 tokens, tensor by tensor, for lora and for lora-fa.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from measure import Measured, in_turn, run
from rich.console import Console
from rich.table import Table

METHODS = ("lora", "pissa", "sorsa")
CONTENDERS = ("svdconvert", "trainer", "trl", "peft", "dense")
"""`peft`: PEFT in a plain loop; `dense`: SORSA as its authors compute it."""
HERE = Path(__file__).parent
RIVAL = HERE.parent / "build" / "rival-trl"
TRL = "trl==1.16.0"
console = Console(width=110)


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
    parser.add_argument("--full-rows", action="store_true", help="join rows to max-length tokens")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--contenders", default="svdconvert,trainer,trl", help=", ".join(CONTENDERS))
    parser.add_argument("--only", choices=("step", "memory"))
    arguments = parser.parse_args()
    if arguments.only != "memory":
        with tempfile.TemporaryDirectory() as scratch:
            steps(arguments, Path(scratch))
    if arguments.only != "step":
        memory(arguments)


def steps(arguments: argparse.Namespace, scratch: Path) -> None:
    """Print a table of step times and peak memory."""
    who = arguments.contenders.split(",")
    if arguments.full_rows:
        arguments.data = str(_joined(Path(arguments.data), scratch / "rows.jsonl", arguments.max_length))
    arguments.batches = str(scratch / "batches.pt")
    if "trl" in who:
        if _has_trl():
            _child(arguments, METHODS[0], "save")
        else:
            who.remove("trl")
    table = Table(
        "method", "who", "seconds of a step", "of the processor", "share", "peak memory", "share", "loss"
    )
    for method in arguments.methods.split(","):
        runs = {
            each: partial(_child, arguments, method, each)
            for each in who
            if each != "dense" or method == "sorsa"
        }
        found = {each: [_said(one) for one in them] for each, them in in_turn(runs, arguments.repeat).items()}
        for each, said in found.items():
            table.add_row(method, each, *_cells(said, found["svdconvert"]))
    console.print(table)


def _cells(said: list[dict[str, float]], own: list[dict[str, float]]) -> list[str]:
    """Medians of a contender, and of svdconvert's share of its processor time and memory."""

    def median(name: str) -> float:
        return statistics.median(one[name] for one in said)

    def share(name: str) -> str:
        return f"{statistics.median(a[name] / b[name] for a, b in zip(own, said, strict=True)):.2f}"

    return [
        f"{median('step'):.2f}",
        f"{median('processor'):.2f}",
        share("processor"),
        f"{median('memory') / 1e6:.0f} MB",
        share("memory"),
        f"{said[-1]['loss']:.4f}",
    ]


def _child(arguments: argparse.Namespace, method: str, who: str) -> Measured:
    passed = ("model", "data", "steps", "batch_size", "rank", "max_length", "precision", "batches")
    values = {name: getattr(arguments, name) for name in passed} | {"method": method}
    command: list[Any] = [sys.executable, HERE / "training" / "step.py", who]
    if who == "trl":
        command = [RIVAL / "bin" / "python", HERE / "training" / "peers.py"]
    return run([*command, json.dumps(values)], threads=arguments.threads)


def _said(measured: Measured) -> dict[str, float]:
    return json.loads(measured.output.splitlines()[-1])


def _joined(data: Path, out: Path, tokens: int) -> Path:
    """Write rows of text that are certainly longer than `tokens`, made of the texts of a JSON-lines file."""
    text = ""
    with out.open("w") as file:
        for line in data.read_text().splitlines():
            text += "\n".join(value for value in json.loads(line).values() if isinstance(value, str)) + "\n\n"
            if len(text) > 8 * tokens:
                file.write(json.dumps({"text": text}) + "\n")
                text = ""
    return out


def _has_trl() -> bool:
    """Install TRL into its own virtual environment unless it is there; say so if that is not possible."""
    python = RIVAL / "bin" / "python"
    if python.exists() and not subprocess.run([python, "-c", "import trl"], capture_output=True).returncode:
        return True
    console.print(f"installing {TRL} into {RIVAL}")
    constraints = HERE.parent / "constraints.txt"
    packages = [TRL, "peft", "torch", "transformers"]
    try:
        subprocess.run([sys.executable, "-m", "venv", RIVAL], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "-c", constraints, *packages], check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        console.print(f"SFTTrainer is left out, because {TRL} cannot be installed: {error}")
        return False
    return True


def memory(arguments: argparse.Namespace) -> None:
    """Print tables of what is saved for the backward pass."""
    values = {"model": arguments.model, "rank": arguments.rank, "precision": arguments.precision}
    command = [sys.executable, HERE / "training" / "activations.py", json.dumps(values)]
    console.print(run(command, threads=arguments.threads).output)


if __name__ == "__main__":
    main()
