"""SHA-256 of every tensor that the commands write, to show that a change of the code moves no number.

    python benchmarks/checksums.py record before.json
    python benchmarks/checksums.py compare before.json

Runs decompose, train, merge, to-lora and convert with every method on tiny models of every family and on
SmolLM2-135M. The bytes depend on the processor and on the version of torch, so record and compare belong on
one machine. Headers, the order of tensors in a file and manifests may differ; names and values may not.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes" / "demo")]

from smollm2 import cache_dir, ensure_smollm2  # noqa: E402

import svdconvert  # noqa: E402
from tests import rwkv6, tiny  # noqa: E402

METHODS = ("lora", "lora-fa", "lora-xs", "middle", "milora", "olora", "pissa", "random", "sorsa")
"""Those that decompose a matrix; `full` is trained only."""
RWKV_LAYOUTS = ("hf", "fla", "web-rwkv", "blinkdl")
RUN = svdconvert.Run(device="cpu", threads=1)
ROWS = ROOT / "recipes" / "demo" / "gsm8k-train.jsonl"


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", choices=("tiny", "smollm2"), help="one part of the work")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, str] = {}
        for place in directories(Path(scratch), arguments.only):
            found |= tensors(place, Path(scratch))
            print(f"{len(found):7} tensors  {place.relative_to(scratch)}", file=sys.stderr)
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
        return
    known = json.loads(arguments.file.read_text())
    if arguments.only:
        known = {name: value for name, value in known.items() if name.startswith(arguments.only)}
    differing = sorted(name for name in {*known, *found} if known.get(name) != found.get(name))
    for name in differing[:20]:
        print(f"differs: {name}")
    print(f"{len(known)} tensors compared, {len(differing)} differ")
    sys.exit(bool(differing))


def directories(scratch: Path, only: str | None) -> Iterator[Path]:
    """Every directory that is written, one at a time; the next call may delete it."""
    if only != "smollm2":
        for model_type in sorted(tiny.CONFIGS):
            with torch.random.fork_rng(devices=[]):
                model = tiny.build(model_type, scratch / f"{model_type}-model", shard=tiny.SHARDED)
            yield from chain(model, scratch / "tiny" / model_type, rank=4)
        yield from conversions(scratch)
    if only != "tiny":
        model = ensure_smollm2(cache_dir() / "smollm2-135m")
        yield from chain(model, scratch / "smollm2" / "chain", rank=16)
        yield from trainings(model, scratch / "smollm2" / "training")


def chain(model: Path, out: Path, rank: int) -> Iterator[Path]:
    """Decompose with every method, merge from both sides, convert into a LoRA."""
    for method in METHODS:
        place = out / method
        split = svdconvert.SplitOptions(method=method, rank=rank)
        svdconvert.decompose(model, place / "decomposed", split, RUN)
        yield place / "decomposed"
        svdconvert.merge(place / "decomposed", place / "from-base", None, RUN)
        yield place / "from-base"
        if list((place / "decomposed").glob("*.safetensors")):
            side = svdconvert.MergeOptions(side="residual")
            svdconvert.merge(place / "decomposed", place / "from-residual", side, RUN)
            yield place / "from-residual"
        shutil.rmtree(place)


def trainings(model: Path, out: Path) -> Iterator[Path]:
    """Train three steps with every method, then merge and convert what was learnt."""
    rows = svdconvert.TrainOptions(
        data=str(ROWS), steps=3, batch_size=2, max_length=96, precision="fp32", device="cpu", lr=1e-3
    )
    for method in (*METHODS, "full"):
        place, split = out / method, svdconvert.SplitOptions(method=method, rank=16)
        svdconvert.train(model, place / "trained", rows, RUN, split=split)
        yield place / "trained"
        if method != "full":
            stochastic = svdconvert.MergeOptions(rounding="stochastic", seed=1)
            svdconvert.merge(place / "trained", place / "merged", None, RUN)
            yield place / "merged"
            svdconvert.merge(place / "trained", place / "stochastic", stochastic, RUN)
            yield place / "stochastic"
            svdconvert.to_lora(place / "trained", place / "lora", None, RUN)
            yield place / "lora"
            truncated = svdconvert.LoraOptions(rank_budget=100, dtype="bfloat16")
            svdconvert.to_lora(place / "trained", place / "lora-budget", truncated, RUN)
            yield place / "lora-budget"
        shutil.rmtree(place)


def conversions(scratch: Path) -> Iterator[Path]:
    """An RWKV-6 from its author's file into every layout, decomposed there, and back."""
    place = scratch / "tiny" / "rwkv6"
    place.mkdir(parents=True)
    model = rwkv6.save(rwkv6.random_model(), scratch / "rwkv6.pth")
    for layout in RWKV_LAYOUTS:
        out = place / layout
        svdconvert.convert(model, out, svdconvert.ConvertOptions(layout=layout), RUN)
        yield out
        svdconvert.convert(out, place / f"{layout}-back", svdconvert.ConvertOptions(layout="blinkdl"), RUN)
        yield place / f"{layout}-back"
        for method in ("pissa", "sorsa", "lora"):
            split = svdconvert.SplitOptions(method=method, rank=4)
            svdconvert.decompose(out, place / f"{layout}-{method}", split, RUN)
            yield place / f"{layout}-{method}"
            svdconvert.merge(place / f"{layout}-{method}", place / f"{layout}-{method}-merged", None, RUN)
            yield place / f"{layout}-{method}-merged"


def tensors(directory: Path, root: Path) -> dict[str, str]:
    """SHA-256 by directory, file and name. The file of a model's shard is left out: a plan may move it."""
    found = {}
    for file in sorted(directory.rglob("*")):
        place = file.relative_to(root).parent.as_posix()
        if file.suffix in (".safetensors", ".st"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    found[f"{place}: {name}"] = _sha256(opened.get_tensor(name))
        elif file.suffix == ".pth":
            for name, tensor in torch.load(file, weights_only=True).items():
                found[f"{place}: {name}"] = _sha256(tensor)
    assert found, f"{directory} holds no tensor"
    return found


def _sha256(tensor: torch.Tensor) -> str:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(words + flat.numpy().tobytes()).hexdigest()[:32]


if __name__ == "__main__":
    main()
