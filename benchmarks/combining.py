"""combine against PEFT and mergekit: time and memory.

    python benchmarks/combining.py adapters DIR
    python benchmarks/combining.py checkpoints DIR --mergekit VENV/bin/mergekit-yaml [--repeat N]

adapters: ten LoRAs of rank 16 on two layers of the shape of a 1.1B Llama, combined into one of rank 16.
PEFT's combination_type svd has the model in memory. checkpoints: three models of SmolLM2's shape and their
base in bfloat16, merged in float32. mergekit 0.1.5 runs from an environment of its own.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import SVDCONVERT, Measured, in_turn, median, peak, ratio, run
from benchmarks.merging import fresh

console = Console()
RANK = 16
ADAPTERS = 10
_1B_LAYERS = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
METHODS: dict[str, dict[str, object]] = {
    "linear": {},
    "slerp": {"t": 0.4},
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "della": {"density": 0.4},
    "breadcrumbs": {"density": 0.5},
    "sce": {"select_topk": 0.3},
    "model_stock": {},
}


def main() -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=["adapters", "checkpoints", "peft"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[*METHODS])
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.part == "peft":
        combine_with_peft(arguments.directory)
    elif arguments.part == "adapters":
        adapters(arguments.directory, arguments.repeat)
    else:
        checkpoints(arguments.directory, arguments.mergekit, arguments.methods, arguments.repeat)


def model_of(values: dict[str, object], out: Path, seed: int) -> Path:
    """A random bfloat16 checkpoint, written if it does not exist."""
    if not (out / "config.json").exists():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(LlamaConfig(**values)).to(torch.bfloat16).save_pretrained(out)
    return out


def adapter_of(base: Path, out: Path, seed: int) -> Path:
    """A random LoRA of all linear layers, written if it does not exist."""
    if not (out / "adapter_config.json").exists():
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        random = torch.Generator().manual_seed(seed)
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=random)
        model.save_pretrained(out)
    return out


def places(directory: Path) -> list[Path]:
    """The directories of the ten adapters."""
    return [directory / f"adapter-{number}" for number in range(ADAPTERS)]


def combine_with_peft(directory: Path) -> None:
    """What a user of PEFT runs: load the model and all adapters, combine, save."""
    first, *others = places(directory)
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    # PEFT would take an adapter called "0" for the first layer.
    names = [f"adapter{number}" for number in range(ADAPTERS)]
    model = PeftModel.from_pretrained(base, first, names[0])
    for path, name in zip(others, names[1:], strict=True):
        model.load_adapter(path, name)
    model.add_weighted_adapter(names, [1.0] * ADAPTERS, "combined", "svd", svd_rank=RANK)
    model.save_pretrained(directory / "theirs", selected_adapters=["combined"])


def adapters(directory: Path, repeat: int) -> None:
    """combine and PEFT in turn, and the distance of what they wrote."""
    base = model_of(_1B_LAYERS, directory / "base", 0)
    paths = [adapter_of(base, path, seed) for seed, path in enumerate(places(directory), 1)]
    ours = directory / "ours"
    words = [*SVDCONVERT, "combine", *paths, "-o", ours, "--rank", RANK, "--init", "none"]
    other = [sys.executable, __file__, "peft", directory]
    theirs = directory / "theirs"
    found = in_turn(
        {"svdconvert": fresh(ours, lambda: run(words)), "PEFT": fresh(theirs, lambda: run(other))}, repeat
    )
    show("ten adapters into one of rank 16", found)
    one, two = (load_file(path / "adapter_model.safetensors") for path in (ours, theirs / "combined"))
    worst = 0.0
    for name in (name for name in one if "lora_A" in name):
        products = [part[name.replace("lora_A", "lora_B")] @ part[name] for part in (one, two)]
        worst = max(worst, float((products[0] - products[1]).norm() / products[1].norm()))
    console.print(f"largest distance of a product from PEFT's: {worst:.1e}")


def variant(base: Path, out: Path, seed: int) -> Path:
    """The model `base` with noise on every tensor, written if it does not exist."""
    if not (out / "config.json").exists():
        out.mkdir(parents=True)
        random = torch.Generator().manual_seed(seed)
        tensors = load_file(base / "model.safetensors")
        moved = {
            name: (one.float() + 0.002 * torch.randn(one.shape, generator=random)).to(one.dtype)
            for name, one in tensors.items()
        }
        save_file(moved, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text((base / "config.json").read_text())
    return out


def checkpoints(directory: Path, mergekit: Path, methods: list[str], repeat: int) -> None:
    """Both programs in turn with the same file, for each method."""
    base = model_of(_SMOLLM2, directory / "base", 0)
    models = [variant(base, directory / f"model-{number}", number) for number in range(1, 4)]
    for method in methods:
        file = directory / f"{method}.yaml"
        file.write_text(yaml.safe_dump(content(method, base, models)))
        ours = directory / "ours"
        theirs = directory / "theirs"
        words = [*SVDCONVERT, "combine", "--config", file, "-o", ours]
        other = [mergekit, file, theirs, "--no-copy-tokenizer", "--quiet"]
        found = in_turn(
            {"svdconvert": fresh(ours, run_of(words)), "mergekit": fresh(theirs, run_of(other))}, repeat
        )
        show(method, found)


def run_of(words: list[object]) -> Callable[[], Measured]:
    """A run of a command, to be started later."""
    return lambda: run(words)


def content(method: str, base: Path, models: list[Path]) -> dict[str, object]:
    """A file in mergekit's format: float32 inside, bfloat16 outside."""
    weights = {"parameters": {"weight": 0.4}} if method not in ("slerp", "sce", "model_stock") else {}
    chosen = models[:1] if method == "slerp" else models
    return {
        "merge_method": method,
        "models": [{"model": str(model), **weights} for model in chosen],
        **({} if method == "linear" else {"base_model": str(base)}),
        "parameters": METHODS[method],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def show(title: str, found: dict[str, list[Measured]]) -> None:
    """Seconds and memory of both, and their ratio."""
    table = Table("", "seconds", "memory, MB", title=title)
    for name, measured in found.items():
        table.add_row(name, f"{median(measured):.1f}", f"{peak(measured) / 1e6:.0f}")
    console.print(table)
    ours, theirs = found.values()
    console.print(f"time: {1 / ratio(theirs, ours):.2f} of it, memory: {peak(ours) / peak(theirs):.2f} of it")


if __name__ == "__main__":
    main()
