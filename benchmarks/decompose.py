"""Decomposition against PEFT's documented recipe and against LAPACK: seconds, memory, residual.

    python benchmarks/decompose.py [--model DIR] [--rank 128] [--repeat 3] [--only niter_4 bottom]

Without --model a Llama with hidden size 2048 and four layers is made in --dir, which is kept. Every run is a
separate process, timed from start to exit; the programs that are compared run in turn.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import SVDCONVERT, Measured, in_turn, median, peak, ratio, run
from models import ensure_model, trained_matrix
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

# Part -> (PEFT's init_lora_weights, our tolerance, goal).
AGAINST = {
    "niter_4": ("pissa_niter_4", 7e-3, 5.0),
    "niter_16": ("pissa_niter_16", 6e-4, 7.0),
    "exact": ("pissa", 1e-3, 18.0),
}
SHAPES = ((4096, 4096), (5632, 2048))
SLICE = 128
ENERGY = 4e-3
GOAL = 10.0
PEFT = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model, out, start, rank = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
config = LoraConfig(r=int(rank), lora_alpha=int(rank), init_lora_weights=start, target_modules=targets)
adapted = get_peft_model(base, config)
adapted.peft_config["default"].init_lora_weights = True
adapted.save_pretrained(out + "/pissa_init")
adapted.unload().save_pretrained(out)
"""


def main() -> None:
    """Run every part, or the ones named."""
    arguments = _arguments()
    if arguments.slice:
        print(json.dumps(bottom_slice(*arguments.slice)))
        return
    parts = [part for part in (*AGAINST, "bottom") if part in arguments.only]
    model = arguments.model
    if model is None and parts != ["bottom"]:
        model = ensure_model(arguments.dir / "300m", "300m")
    best = optimum(model, arguments.rank, arguments.dir) if parts != ["bottom"] else 0.0
    rows: list[dict[str, Any]] = []
    for part in parts:
        if part == "bottom":
            rows += [against_lapack(shape, arguments.repeat) for shape in SHAPES]
        else:
            rows.append(against_peft(part, model, arguments, best))
        if not arguments.json:
            show(rows[-2:] if part == "bottom" else rows[-1:])
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    else:
        Console().print(machine())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint directory; one is made if it is not given")
    parser.add_argument("--dir", type=Path, default=Path(".cache/benchmark"), help="for models and outputs")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=[*AGAINST, "bottom"], nargs="*", default=[*AGAINST, "bottom"])
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    parser.add_argument("--slice", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def machine() -> str:
    """The properties of the machine on which the figures depend."""
    names = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    units = [unit for unit, name in names.items() if getattr(torch.cpu, name, bool)()]
    fast = ", ".join(units) or "no fast bfloat16"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {fast}"


def against_peft(part: str, model: Path, arguments: argparse.Namespace, best: float) -> dict[str, Any]:
    """One of PEFT's recipes and svdconvert with a tolerance, in turn."""
    start, tol, goal = AGAINST[part]
    theirs = arguments.dir / "peft"
    ours = arguments.dir / "svdconvert"
    rank = str(arguments.rank)
    commands = {
        "peft": (theirs, [sys.executable, "-c", PEFT, model, theirs, start, rank]),
        "svdconvert": (ours, [*SVDCONVERT, "decompose", model, "-o", ours, "--rank", rank, "--tol", tol]),
    }
    found = in_turn({name: partial(_fresh, *each) for name, each in commands.items()}, arguments.repeat)
    residuals = {name: residual_norm(out) for name, (out, _) in commands.items()}
    for out, _ in commands.values():
        shutil.rmtree(out)
    return _row(f"{start}, --tol {tol:g}", found, goal) | {
        "optimum": best,
        "residual": residuals,
        "excess": {name: norm / best - 1 for name, norm in residuals.items()},
    }


def against_lapack(shape: tuple[int, int], repeat: int) -> dict[str, Any]:
    """The bottom slice of one matrix by a full SVD and by svdconvert; the processes time themselves."""
    size = [str(side) for side in shape]
    command = [sys.executable, __file__, "--slice", *size]
    runs: dict[str, Callable[[], Measured]] = {
        name: partial(_timed, [*command, name]) for name in ("full SVD", "svdconvert")
    }
    found = in_turn(runs, repeat)
    energy = {name: json.loads(each[-1].output)["energy"] for name, each in found.items()}
    row = _row(f"bottom slice {shape[0]} x {shape[1]}", found, GOAL)
    return row | {"excess": {"svdconvert": energy["svdconvert"] / energy["full SVD"] - 1}}


def bottom_slice(rows: str, columns: str, engine: str) -> dict[str, float]:
    """Compute one bottom slice in this process: seconds, and the energy of the slice.

    A corner of the matrix is computed before, without being timed, because the first call of a process
    creates threads and loads kernels.
    """
    from svdconvert.linalg.solver import Solver

    def smallest(matrix: Tensor) -> Tensor:
        if engine == "svdconvert":
            return Solver("weight", tol=ENERGY).bottom(matrix, SLICE).right_RI
        return torch.linalg.svd(matrix, full_matrices=False).Vh[-SLICE:]

    generator = torch.Generator().manual_seed(0)
    weight = trained_matrix(int(rows), int(columns), generator).float()
    smallest(weight[:1024, :512])
    started = time.perf_counter()
    right = smallest(weight)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "energy": float((weight.double() @ right.double().T).square().sum())}


def _timed(command: list[str]) -> Measured:
    whole = run(command)
    return Measured(json.loads(whole.output)["seconds"], whole.memory, whole.output)


def _fresh(out: Path, command: list[object]) -> Measured:
    shutil.rmtree(out, ignore_errors=True)
    return run(command)


def _row(title: str, found: dict[str, list[Measured]], goal: float) -> dict[str, Any]:
    theirs, ours = found.values()
    return {
        "against": title,
        "seconds": {name: [round(each.seconds, 3) for each in runs] for name, runs in found.items()},
        "median": {name: median(runs) for name, runs in found.items()},
        "memory": {name: peak(runs) for name, runs in found.items()},
        "ratio": ratio(theirs, ours),
        "goal": goal,
    }


def targets(directory: Path) -> Iterator[Tensor]:
    """Every projection of a checkpoint, in float64."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in list(tensors.keys()):
                if name.endswith("_proj.weight"):
                    yield tensors.get_tensor(name).double()


def residual_norm(out: Path) -> float:
    """Root of the sum of squares over all targets."""
    return sum(float(each.square().sum()) for each in targets(out)) ** 0.5


def optimum(model: Path, rank: int, directory: Path) -> float:
    """The smallest residual that this rank allows, from eigenvalues in float64; computed once."""
    directory.mkdir(parents=True, exist_ok=True)
    notes = directory / "optimum.json"
    known: dict[str, float] = json.loads(notes.read_text()) if notes.exists() else {}
    key = f"{model.resolve()} {rank}"
    if key not in known:
        total = 0.0
        for weight in targets(model):
            tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
            total += float(torch.linalg.eigvalsh(tall.T @ tall)[:-rank].clamp_min(0.0).sum())
        known[key] = total**0.5
        notes.write_text(json.dumps(known))
    return known[key]


def show(rows: list[dict[str, Any]]) -> None:
    """Print one table for each row."""
    for row in rows:
        table = Table(title=f"{row['against']}: {row['ratio']:.1f} times faster, goal {row['goal']:.0f}")
        for head in ("", "median", "all runs", "memory", "residual", "above the optimum"):
            table.add_column(head, justify="left" if not head else "right")
        for name, seconds in row["median"].items():
            norm = row.get("residual", {}).get(name)
            above = row["excess"].get(name)
            table.add_row(
                name,
                f"{seconds:.2f} s",
                " ".join(f"{each:.2f}" for each in row["seconds"][name]),
                f"{row['memory'][name] / 1e6:.0f} MB",
                "" if norm is None else f"{norm:.3f}",
                "" if above is None else f"{above:.2e}",
            )
        Console().print(table)


if __name__ == "__main__":
    main()
