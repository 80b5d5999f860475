"""extract against mergekit-extract-lora: error, time and memory at the same rank.

    python benchmarks/merging.py extract DIR --mergekit VENV/bin/mergekit-extract-lora [--model 1b2]

mergekit 0.1.5 runs from an environment of its own. Both programs read the same two bfloat16 checkpoints: a
model, and the model after a change with a decaying spectrum over noise, as training leaves it.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import SVDCONVERT, Measured, in_turn, median, peak, ratio, run
from benchmarks.models import SIZES, ensure_model
from recipes.demo.smollm2 import ensure_smollm2

console = Console()
RANK = 32
_SIGNAL = 0.02  # ||change of low rank|| / ||W||
_NOISE = 0.005  # ||noise|| / ||W||


def main() -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=["extract"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mergekit", type=Path, required=True)
    parser.add_argument("--model", choices=["smollm2", *SIZES], default="smollm2")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--no-errors", action="store_true", help="leave out the decompositions in float64")
    arguments = parser.parse_args()
    compared = not arguments.no_errors
    extract(arguments.directory, arguments.model, arguments.mergekit, arguments.repeat, errors=compared)


def extract(directory: Path, model: str, mergekit: Path, repeat: int, *, errors: bool) -> None:
    """Both programs in turn and, with `errors`, those of what they wrote."""
    base = ensure_smollm2(directory / model) if model == "smollm2" else ensure_model(directory / model, model)
    tuned = ensure_tuned(base, directory / f"{model}-tuned")
    ours = directory / "ours"
    theirs = directory / "theirs"
    words = [*SVDCONVERT, "extract", base, tuned, "-o", ours, "--rank", RANK, "--keep", "none"]
    other = [mergekit, "--model", tuned, "--base-model", base, "--out-path", theirs]
    other += ["--max-rank", RANK, "-e", "embed_tokens", "-e", "lm_head", "-e", "norm", "--quiet"]
    runs = {"svdconvert": fresh(ours, lambda: run(words)), "mergekit": fresh(theirs, lambda: run(other))}
    found = in_turn(runs, repeat)
    start = run([sys.executable, "-c", "import svdconvert.commands.extract, svdconvert.cli.app"])
    table = Table("", "error / best", "seconds", "memory, MB", title=f"extract, {model}, rank {RANK}")
    for name, out in (("svdconvert", ours), ("mergekit", theirs)):
        error = f"{error_over_best(base, tuned, out):.6f}" if errors else ""
        table.add_row(name, error, f"{median(found[name]):.1f}", f"{peak(found[name]) / 1e6:.0f}")
    table.add_row("bare import", "", f"{start.seconds:.1f}", f"{start.memory / 1e6:.0f}")
    console.print(table)
    console.print(f"mergekit takes {ratio(found['mergekit'], found['svdconvert']):.1f} times as long.")


def ensure_tuned(base: Path, out: Path, seed: int = 1) -> Path:
    """The model `base` after a change of its blocks' matrices, in the same files."""
    if (out / "config.json").exists():
        return out
    shutil.copytree(base, out)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        save_file(
            {name: _moved(name, one, generator) for name, one in tensors.items()}, file, {"format": "pt"}
        )
    return out


def _moved(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    if weight.dim() != 2 or ".layers." not in name:
        return weight
    rows, columns = weight.shape
    size = float(torch.linalg.vector_norm(weight.float()))
    sigma = 1.0 / torch.arange(1, 65).float()
    left = torch.randn(rows, 64, generator=generator) * sigma
    signal = left @ torch.randn(64, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    change = signal * (_SIGNAL * size / float(torch.linalg.vector_norm(signal)))
    return (weight.float() + change + noise * (_NOISE * size / sqrt(rows * columns))).to(weight.dtype)


def error_over_best(base: Path, tuned: Path, lora: Path) -> float:
    """||change - BA|| over that of the best approximations, over all matrices that the LoRA adapts."""
    config = json.loads((lora / "adapter_config.json").read_text())
    factors = load_file(lora / "adapter_model.safetensors")
    lost = best = 0.0
    for name, change in _changes(base, tuned):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in factors:
            continue
        right = factors[f"{key}.lora_A.weight"].double()
        left = factors[f"{key}.lora_B.weight"].double()
        scale = (
            config["alpha_pattern"].get(name.removesuffix(".weight"), config["lora_alpha"]) / right.shape[0]
        )
        lost += float((change - scale * left @ right).square().sum())
        squares = torch.linalg.eigvalsh(
            change.T @ change if len(change) > len(change.T) else change @ change.T
        )
        best += float(squares.clamp_min(0)[: -right.shape[0]].sum())
    return sqrt(lost / best)


def _changes(base: Path, tuned: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tuned - base in float64) of the matrices of the blocks."""
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as before, safe_open(tuned / file.name, "pt") as after:
            for name in [*before.keys()]:
                if ".layers." in name and len(before.get_slice(name).get_shape()) == 2:
                    yield name, after.get_tensor(name).double() - before.get_tensor(name).double()


def fresh(out: Path, command: Callable[[], Measured]) -> Callable[[], Measured]:
    """The command, with its output removed before."""

    def once() -> Measured:
        shutil.rmtree(out, ignore_errors=True)
        return command()

    return once


if __name__ == "__main__":
    main()
