"""A directory of every kind, made from one tiny base."""

import shutil
from pathlib import Path

import torch

from svdconvert import (
    ConvertOptions,
    LoraOptions,
    Run,
    SplitOptions,
    TrainOptions,
    convert,
    decompose,
    merge,
    to_lora,
    train,
)
from tests import rwkv6
from tests.conftest import Build
from tests.reading import readable, write_sums

RUN = Run(device="cpu", threads=1)
KINDS = (
    "plain",
    "decomposed",
    "initial",
    "trained",
    "merged",
    "lora",
    "finetuned",
    "foreign",
    "rwkv",
    "rwkv-trained",
)
PLAIN = ("plain", "merged", "finetuned", "rwkv")


def make_kinds(checkpoint: Build, home: Path) -> Path:
    """Write a directory of every kind, and rows to train on, into `home`."""
    base = readable(checkpoint("llama", dtype=torch.bfloat16, tied=False), home / "plain")
    readable(checkpoint("qwen2"), home / "other")
    data = str(write_sums(home / "rows.jsonl", rows=6))
    write_sums(home / "more.jsonl", rows=4)
    (home / "questions.jsonl").write_text('{"question": "what is 1 + 2 ?", "answer": "#### 3"}\n')
    options = TrainOptions(data=data, steps=1, batch_size=2, lr=0.1)
    decompose(base, home / "decomposed", SplitOptions(rank=4), RUN)
    decompose(base, home / "initial", SplitOptions(rank=4, method="lora"), RUN)
    train(home / "decomposed", home / "trained", options, RUN)
    train(base, home / "finetuned", options, RUN, split=SplitOptions(method="full"))
    merge(home / "trained", home / "merged", run=RUN)
    to_lora(home / "trained", home / "lora", LoraOptions(), RUN)
    shutil.copytree(home / "lora", home / "foreign")
    (home / "foreign" / "svdconvert.json").unlink()
    rwkv6.save(rwkv6.random_model(vocabulary=256), home / "rwkv.pth")
    convert(home / "rwkv.pth", home / "rwkv", ConvertOptions(layout="hf"), RUN)
    train(home / "rwkv", home / "rwkv-trained", options, RUN, split=SplitOptions(rank=4))
    return home
