"""Decompose, merge and train a 7B-shaped model of eight layers on one GPU, in turn with PEFT.

    python benchmarks/gpu.py [--dir .cache/gpu] [--repeat 1] [--only decompose exact merge train]

The model is made on the GPU, 3.8 GB in --dir; nothing is downloaded. Every run is a separate process. "whole"
is its time from start to exit, "work" the time after its imports, which for a model of another size grows
with the size; GB/s are bytes of the model per second of work. Without PEFT, or without the packages that
training needs, those runs are left out.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import Measured, in_turn, run
from models import ensure_model
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CONTENDERS = Path(__file__).with_name("gpu_contenders.py")
RANK = 128
MERGE_RANK = 64
BATCH = 4
LENGTH = 512
TOLERANCES = {"pissa_niter_4": 6e-3, "pissa_niter_16": 7e-4, "pissa": 1e-3}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
console = Console(width=110)


def main() -> None:
    """Run every part, or the ones named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"decompose": decompose, "exact": exact, "merge": merge, "train": train}
    parser.add_argument("--dir", type=Path, default=Path(".cache/gpu"))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8, choices=(1, 2, 8))
    parser.add_argument("--only", choices=parts, nargs="*", default=list(parts))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA GPU here, so there is nothing to measure")
    console.print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for part in arguments.only:
        parts[part](arguments)


def decompose(arguments: argparse.Namespace) -> None:
    """PEFT's approximate recipes."""
    for start in ("pissa_niter_4", "pissa_niter_16"):
        _decompose(arguments, arguments.layers, start)


def exact(arguments: argparse.Namespace) -> None:
    """PEFT's full SVD, on one layer."""
    _decompose(arguments, 1, "pissa")


def _decompose(arguments: argparse.Namespace, layers: int, start: str) -> None:
    model = _model(arguments, layers)
    ours = {"model": model, "out": arguments.dir / "ours", "rank": RANK, "tol": TOLERANCES[start]}
    theirs = {"model": model, "out": arguments.dir / "peft", "rank": RANK, "start": start}
    found = _in_turn(arguments, {"svdconvert": ("decompose", ours), "PEFT": ("peft_decompose", theirs)})
    best = optimum(model)
    residuals = {
        name: residual(arguments.dir / ("ours" if name == "svdconvert" else "peft")) / best - 1
        for name in found
    }
    title = f"decompose, {layers} layers, r {RANK}, {start} / --tol {TOLERANCES[start]:g}"
    show(title, found, _nbytes(model), {name: f"{above:.1e}" for name, above in residuals.items()})
    _remove(arguments)


def merge(arguments: argparse.Namespace) -> None:
    """A plain LoRA into its base."""
    model = _model(arguments, arguments.layers)
    adapter = _adapter(arguments.dir / f"lora-{arguments.layers}", arguments.layers)
    options = {
        name: {"model": model, "adapter": adapter, "out": arguments.dir / name} for name in ("ours", "peft")
    }
    runs = {"svdconvert": ("merge", options["ours"]), "PEFT": ("peft_merge", options["peft"])}
    found = _in_turn(arguments, runs)
    show(f"merge, {arguments.layers} layers, LoRA of rank {MERGE_RANK}", found, _nbytes(model), {})
    _remove(arguments)


def train(arguments: argparse.Namespace) -> None:
    """A step with LoRA of rank 16, with and without recomputed activations."""
    if find_spec("datasets") is None:
        console.print("train: left out, because datasets is not installed")
        return
    model = _model(arguments, arguments.layers)
    for recompute in (False, True):
        common = {
            "model": model,
            "data": _data(model, arguments.dir),
            "steps": 12,
            "batch": BATCH,
            "length": LENGTH,
            "recompute": recompute,
        }
        runs = {
            "svdconvert": ("train", common | {"out": arguments.dir / "ours"}),
            "Trainer + PEFT": ("peft_train", common | {"out": arguments.dir / "peft"}),
        }
        words = ", activations recomputed" if recompute else ""
        found = _in_turn(arguments, runs)
        show(f"train, LoRA r 16, {BATCH} x {LENGTH} tokens, bf16{words}", found, None, {})
        _remove(arguments)


def _in_turn(
    arguments: argparse.Namespace, runs: dict[str, tuple[str, dict[str, Any]]]
) -> dict[str, list[Measured]]:
    if find_spec("peft") is None:
        console.print("PEFT is not installed: only svdconvert is measured")
        runs = {name: each for name, each in runs.items() if "PEFT" not in name}

    def once(name: str, options: dict[str, Any]) -> Measured:
        shutil.rmtree(options["out"], ignore_errors=True)
        return run([sys.executable, CONTENDERS, name, json.dumps(options, default=str)], settling=0.5)

    return in_turn({who: partial(once, *each) for who, each in runs.items()}, arguments.repeat)


def show(title: str, found: dict[str, list[Measured]], nbytes: int | None, residuals: dict[str, str]) -> None:
    """Print a table: medians of the runs, and the ratio of each to the first contender."""
    columns = ["", "whole", "ratio", "work", "ratio", "GB/s" if nbytes else "step", "GPU peak", "host peak"]
    table = Table(*columns, *(["above optimum"] if residuals else []), title=title)
    base: dict[str, float] = {}
    for who, measured in found.items():
        said = [json.loads(each.output.splitlines()[-1]) for each in measured]
        whole = statistics.median(each.seconds for each in measured)
        work = statistics.median(each["seconds"] for each in said)
        step = statistics.median(each["step"] or 0.0 for each in said)
        base = base or {"whole": whole, "work": work, "step": step}
        rate = f"{nbytes / work / 1e9:.2f}" if nbytes else f"{step:.3f} s ({step / base['step']:.2f})"
        table.add_row(
            who,
            f"{whole:.1f} s",
            f"{whole / base['whole']:.2f}",
            f"{work:.2f} s",
            f"{work / base['work']:.2f}",
            rate,
            f"{max(each['gpu'] for each in said) / 1e9:.2f} GB",
            f"{max(each.memory for each in measured) / 1e9:.2f} GB",
            *([residuals[who]] if residuals else []),
        )
    console.print(table)


def _model(arguments: argparse.Namespace, layers: int) -> Path:
    return ensure_model(arguments.dir / f"7b{layers}", f"7b{layers}", device="cuda")


def _nbytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _remove(arguments: argparse.Namespace) -> None:
    for name in ("ours", "peft"):
        shutil.rmtree(arguments.dir / name, ignore_errors=True)


def targets(directory: Path) -> Iterator[Tensor]:
    """The matrices of the first layer of a checkpoint, in float64 on the GPU."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt", device="cuda") as tensors:
            for name in list(tensors.keys()):
                if ".layers.0." in name and name.endswith("_proj.weight"):
                    yield tensors.get_tensor(name).double()


def residual(out: Path) -> float:
    """Root of the sum of squares over the matrices of the first layer."""
    return sum(float(each.square().sum()) for each in targets(out)) ** 0.5


def optimum(model: Path) -> float:
    """The smallest such residual, from eigenvalues in float64."""
    total = 0.0
    for weight in targets(model):
        tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
        total += float(torch.linalg.eigvalsh(tall.T @ tall)[:-RANK].clamp_min(0.0).sum())
    return total**0.5


def _adapter(out: Path, layers: int) -> Path:
    """A LoRA with random factors, in PEFT's format."""
    out.mkdir(parents=True, exist_ok=True)
    shapes = dict.fromkeys(PROJECTIONS[:4], (4096, 4096)) | dict.fromkeys(PROJECTIONS[4:6], (11008, 4096))
    shapes["down_proj"] = (4096, 11008)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            part = "self_attn" if name in PROJECTIONS[:4] else "mlp"
            prefix = f"base_model.model.model.layers.{layer}.{part}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(MERGE_RANK, columns) / columns**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, MERGE_RANK) * 0.01
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": MERGE_RANK,
        "lora_alpha": MERGE_RANK,
        "target_modules": list(PROJECTIONS),
        "base_model_name_or_path": None,
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def _data(model: Path, directory: Path) -> Path:
    """Rows of LENGTH random words, and a tokenizer of one token per word next to the model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, 32000)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 32000, (64, LENGTH), generator=generator)
    rows = [json.dumps({"text": " ".join(f"w{number}" for number in row)}) for row in words.tolist()]
    file = directory / "rows.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return file


if __name__ == "__main__":
    main()
