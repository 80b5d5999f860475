"""Write tests/data/format1: one small directory of every kind, with manifests of format 1.

The directories were written by the last version that writes format 1, revision 0a7adff, and are not made
again: a later svdconvert writes a later format. Run from the root of the repository, at that revision:

    OMP_NUM_THREADS=1 python -m tests.data.make_format1

Every absolute path in a manifest is replaced by one below /models.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from svdconvert import (
    ConvertOptions,
    LoraOptions,
    MergeOptions,
    Run,
    SplitOptions,
    TrainOptions,
    convert,
    decompose,
    merge,
    to_lora,
    train,
)
from tests import rwkv6, tiny
from tests.reading import write_sums, write_tokenizer

FORMAT1 = Path(__file__).with_name("format1")
RUN = Run(device="cpu", threads=1)
STEPS = {"steps": 2, "batch_size": 2, "max_length": 32, "lr": 2e-2, "precision": "fp32", "device": "cpu"}
NEUTRAL = "/models"
"""What stands in the manifests in place of the directory in which they were made."""


def make(directory: Path) -> None:
    """Write a base and what every command makes of it into `directory`."""
    base = _llama(directory / "base")
    data = str(write_sums(directory / "sums.jsonl"))
    decompose(base, directory / "decomposed", SplitOptions(rank=2), RUN)
    train(directory / "decomposed", directory / "trained", TrainOptions(data=data, **STEPS), RUN)
    merge(directory / "trained", directory / "merged", MergeOptions(), RUN)
    to_lora(directory / "trained", directory / "lora", LoraOptions(), RUN)
    to_lora(directory / "trained", directory / "lora-truncated", LoraOptions(rank=1), RUN)
    full = SplitOptions(method="full")
    train(base, directory / "full", TrainOptions(data=data, **STEPS), RUN, split=full)
    labels = str(_write_labels(directory / "labels.jsonl"))
    classify = TrainOptions(data=labels, task="classify", text_fields="text", **STEPS)
    train(directory / "decomposed", directory / "classifier", classify, RUN)
    model = rwkv6.random_model(layers=1, width=32, head=16, vocabulary=32)
    rwkv6.save(model, directory / "rwkv6.pth")
    convert(directory / "rwkv6.pth", directory / "converted", ConvertOptions(layout="hf"), RUN)


def _llama(directory: Path) -> Path:
    """One layer of width 16, with a tokenizer of words."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
        tiny.fill(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def _write_labels(path: Path) -> Path:
    rows = [f'{{"text": "{a} + 1 = {b}", "label": "{a + 1 == b}"}}\n' for a in range(4) for b in (2, 3)]
    path.write_text("".join(rows))
    return path


def _hide_paths(directory: Path) -> None:
    for manifest in directory.rglob("svdconvert.json"):
        manifest.write_text(manifest.read_text().replace(str(directory), NEUTRAL))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory))
        _hide_paths(Path(directory))
        shutil.rmtree(FORMAT1, ignore_errors=True)
        shutil.copytree(directory, FORMAT1)
