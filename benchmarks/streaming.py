"""Memory, merging, interruption and ranks, measured.

    python benchmarks/streaming.py --dir /tmp/benchmark [--size 1b] [--repeat 3]

The directory holds the models (3 GB for 1b) and is kept between runs; outputs are removed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import SVDCONVERT, TORCHRUN, Measured, in_turn, median, peak, ratio, run
from models import ensure_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

RANK = 64
PEFT_MERGE = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
residual, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(residual)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
BY_SHARD = """
import json, shutil, sys, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
base, adapter, out = map(Path, sys.argv[1:])
out.mkdir()
config = json.loads((adapter / "adapter_config.json").read_text())
factors = load_file(adapter / "adapter_model.safetensors")
for path in base.iterdir():
    if path.is_file() and path.suffix != ".safetensors":
        shutil.copy(path, out)
for path in sorted(base.glob("*.safetensors")):
    merged = {}
    with safe_open(path, "pt") as shard:
        for name in shard.keys():
            tensor = shard.get_tensor(name)
            prefix = "base_model.model." + name.removesuffix(".weight")
            if prefix + ".lora_A.weight" in factors:
                left = factors[prefix + ".lora_B.weight"].float()
                right = factors[prefix + ".lora_A.weight"].float()
                delta = left @ right * (config["lora_alpha"] / config["r"])
                tensor = (tensor.float() + delta).to(tensor.dtype)
            merged[name] = tensor
    save_file(merged, out / path.name, metadata={"format": "pt"})
"""
ARITHMETIC = """
import sys, time, json, torch
from pathlib import Path
from svdconvert.inputs.open_adapter import open_adapter_delta
from svdconvert.inputs.sources import Sources
from svdconvert.linalg.delta import as_lora, merged_
from svdconvert.manifest.schema import read_manifest
adapter, decomposed = sys.argv[1:]
delta, seconds = open_adapter_delta(adapter, Sources(residual=decomposed)), 0.0
for matrix in read_manifest(Path(decomposed)).matrices.values():
    weight = torch.zeros(matrix.shape, dtype=torch.bfloat16)
    trained, initial = delta.trained(matrix.module), delta.initial(matrix.module)
    started = time.perf_counter()
    merged_(weight, as_lora(*trained, *initial), weight.dtype)
    seconds += time.perf_counter() - started
print(json.dumps(seconds))
"""

console = Console()


def main() -> None:
    """Run every part, or the ones named."""
    parts = {"memory": memory, "merge": merge, "kill": kill, "ranks": ranks}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--size", default="1b", choices=["tiny", "300m", "1b"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=parts, nargs="*", default=list(parts))
    arguments = parser.parse_args()
    for part in arguments.only:
        parts[part](arguments.dir, arguments.size, arguments.repeat)


def split(directory: Path, size: str) -> tuple[Path, Path]:
    """The model and its decomposed directory, made once."""
    model = ensure_model(directory / size, size)
    out = directory / f"{size}-pissa"
    if not out.exists():
        run([*SVDCONVERT, "decompose", model, "-o", out, "--rank", RANK])
    return model, out


def trained(decomposed: Path) -> Path:
    """An adapter in PEFT's format, as if trained from the initial one: every factor moved a little."""
    out = decomposed.with_name(f"{decomposed.name}-trained")
    if not out.exists():
        out.mkdir()
        start = decomposed / "pissa_init"
        generator = torch.Generator().manual_seed(0)
        factors = load_file(start / "adapter_model.safetensors")
        moved = {
            name: factor + 0.01 * factor.std() * torch.randn(factor.shape, generator=generator)
            for name, factor in factors.items()
        }
        save_file(moved, out / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copy(start / "adapter_config.json", out)
    return out


def fresh(out: Path, command: Callable[[], Measured]) -> Callable[[], Measured]:
    """The command, with its output removed before."""

    def once() -> Measured:
        shutil.rmtree(out, ignore_errors=True)
        return command()

    return once


def memory(directory: Path, size: str, repeat: int) -> None:
    """Peak anonymous memory of each command, on a small model and on a larger one of the same width."""
    table = Table("command", "300m", size, "growth", title="Peak anonymous memory, MB")
    bare = run([sys.executable, "-c", "import svdconvert.commands.decompose, svdconvert.cli.app"]).memory
    table.add_row("bare import", f"{bare / 1e6:.0f}", f"{bare / 1e6:.0f}", "")
    out = directory / "out"
    for command in ("decompose", "merge", "to-lora", "verify"):
        found = []
        for name in ("300m", size):
            model, decomposed = split(directory, name)
            source = {
                "decompose": [model, "--rank", RANK],
                "merge": [trained(decomposed), "--residual", decomposed],
                "to-lora": [trained(decomposed), "--residual", decomposed],
                "verify": [decomposed],
            }[command]
            target = [] if command == "verify" else ["-o", out]
            words = [*SVDCONVERT, command, *source, *target]
            runs = {command: fresh(out, lambda words=words: run(words))}
            found.append(peak(in_turn(runs, repeat)[command]))
        table.add_row(command, *(f"{each / 1e6:.0f}" for each in found), f"{found[1] / found[0] - 1:+.1%}")
    shutil.rmtree(out, ignore_errors=True)
    console.print(table)
    largest = 2048 * 5632 * 4
    console.print(
        f"Promised: bare import plus 6 times the largest target, {largest / 1e6:.0f} MB in float32."
    )


def merge(directory: Path, size: str, repeat: int) -> None:
    """svdconvert merge, PEFT's merge_and_unload, a loop over shards (as axolotl's merge), and cp."""
    model, decomposed = split(directory, size)
    adapter = trained(decomposed)
    out = directory / "merged"
    copy = directory / "copy"
    ours = [*SVDCONVERT, "merge", adapter, "--residual", decomposed, "-o", out]
    runs = {
        "svdconvert merge": fresh(out, lambda: run(ours)),
        "PEFT": fresh(copy, lambda: run([sys.executable, "-c", PEFT_MERGE, decomposed, adapter, copy])),
        "shard by shard": fresh(
            copy, lambda: run([sys.executable, "-c", BY_SHARD, decomposed, adapter, copy])
        ),
        "cp of the base": fresh(copy, lambda: run(["cp", "-rL", model, copy])),
    }
    found = in_turn(runs, repeat)
    table = Table("", "seconds", "memory, MB", "against PEFT", title=f"Merging {size}, rank {RANK}")
    for name, measured in found.items():
        against = f"{ratio(measured, found['PEFT']):.2f}"
        table.add_row(name, f"{median(measured):.2f}", f"{peak(measured) / 1e6:.0f}", against)
    console.print(table)
    arithmetic = json.loads(run([sys.executable, "-c", ARITHMETIC, adapter, decomposed]).output)
    imports = "import svdconvert.cli.app, svdconvert.commands.merge"
    start = run([sys.executable, "-c", imports]).seconds
    least = median(found["cp of the base"]) + arithmetic
    share = (median(found["svdconvert merge"]) - start) / least
    console.print(
        f"cp {least - arithmetic:.2f} s + arithmetic {arithmetic:.2f} s = {least:.2f} s; merge takes "
        f"{share:.2f} times as long, without the {start:.2f} s in which the program starts."
    )
    for path in (out, copy):
        shutil.rmtree(path, ignore_errors=True)


def kill(directory: Path, size: str, repeat: int) -> None:
    """The time that one kill in the middle costs."""
    model, _ = split(directory, size)
    out = directory / "killed"
    command = [*SVDCONVERT, "decompose", model, "-o", out, "--rank", RANK]
    undisturbed: list[float] = []
    killed: list[float] = []
    for _ in range(repeat):
        shutil.rmtree(out, ignore_errors=True)
        undisturbed.append(run(command).seconds)
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
        time.sleep(undisturbed[-1] / 2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = time.perf_counter() - started
        killed.append(before + run(command).seconds)
    shutil.rmtree(out, ignore_errors=True)
    lost = sorted(b - a for a, b in zip(undisturbed, killed, strict=True))[repeat // 2]
    console.print(
        f"Undisturbed {sorted(undisturbed)[repeat // 2]:.1f} s; one kill in the middle costs {lost:.1f} s."
    )


def ranks(directory: Path, size: str, repeat: int) -> None:
    """One rank and two ranks, with one thread each."""
    model, _ = split(directory, size)
    out = directory / "ranks"
    tail = ["-m", "svdconvert", "decompose", model, "-o", out, "--rank", RANK, "--threads", 1]
    runs = {
        f"{count} ranks": fresh(out, lambda count=count: run([*TORCHRUN, count, *tail], threads=1))
        for count in (1, 2)
    }
    found = in_turn(runs, repeat)
    shutil.rmtree(out, ignore_errors=True)
    gain = ratio(found["1 ranks"], found["2 ranks"])
    one, two = median(found["1 ranks"]), median(found["2 ranks"])
    console.print(f"1 rank {one:.1f} s, 2 ranks {two:.1f} s: {gain:.2f} times as fast.")


if __name__ == "__main__":
    main()
