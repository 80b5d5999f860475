"""Full fine-tuning writes a plain checkpoint: same names, same element types, other values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert.commands.decompose import decompose
from svdconvert.commands.train import train
from svdconvert.config.train import TrainOptions
from svdconvert.errors import ArtifactError, RecipeError
from svdconvert.manifest.schema import read_manifest
from svdconvert.pipeline.decompose import SplitOptions
from tests.program import refused, succeeded
from tests.reading import readable, write_sums
from tests.stock import logits, plain, tensors

Build = Callable[..., Path]
FULL = SplitOptions(method="full")


def options(directory: Path, **values: Any) -> TrainOptions:
    usual: dict[str, Any] = {"steps": 3, "batch_size": 2, "max_length": 48, "lr": 1e-3, "device": "cpu"}
    return TrainOptions(data=str(write_sums(directory / "sums.jsonl")), **(usual | values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_full_fine_tuning_trains_every_tensor_and_keeps_names_and_dtypes(
    family: str, dtype: torch.dtype, checkpoint: Build, tmp_path: Path
) -> None:
    base = readable(checkpoint(family, dtype=dtype), tmp_path / "base")
    manifest = train(base, tmp_path / "full", options(tmp_path), split=FULL)
    before, after = tensors(base), tensors(tmp_path / "full")
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }
    still = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert not [name for name in still if name.endswith("_proj.weight") or "embed" in name]
    assert (manifest.kind, manifest.method) == ("finetuned", "full")
    assert (logits(plain(tmp_path / "full")) - logits(plain(base))).abs().max() > 1e-3
    assert (tmp_path / "full" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    # The result may be decomposed and trained further.
    decompose(tmp_path / "full", tmp_path / "pissa", SplitOptions(rank=4))


def test_a_step_of_full_fine_tuning_is_one_of_adamw(checkpoint: Build, tmp_path: Path) -> None:
    """One step at a constant rate moves every entry with a gradient by the rate."""
    base = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "base")
    train(
        base, tmp_path / "full", options(tmp_path, steps=1, schedule="constant", precision="fp32"), split=FULL
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = (tensors(tmp_path / "full")[name] - tensors(base)[name]).abs()
    assert float(moved.median()) == pytest.approx(1e-3, rel=1e-2)


def test_from_the_command_line(checkpoint: Build, tmp_path: Path) -> None:
    base = readable(checkpoint("llama"), tmp_path / "base")
    data = write_sums(tmp_path / "sums.jsonl")
    typed = ("train", base, "--method", "full", "--data", data, "--steps", 2, "--max-length", 48, "-o")
    shown = succeeded(*typed, tmp_path / "full").out
    assert "from_pretrained" in shown and "to-lora" not in shown
    assert read_manifest(tmp_path / "full").options["lr"] == 1e-5
    assert "with all weights fine-tuned" in succeeded("inspect", tmp_path / "full").out
    succeeded("verify", tmp_path / "full")
    refused(
        "decompose", base, "-o", tmp_path / "out", "--method", "full", words=["nothing to decompose", "train"]
    )


def test_full_fine_tuning_refuses_what_it_cannot_train(checkpoint: Build, tmp_path: Path) -> None:
    base = readable(checkpoint("llama"), tmp_path / "base")
    with pytest.raises(RecipeError, match="every weight"):
        train(base, tmp_path / "full", options(tmp_path, train_also=("norms",)), split=FULL)
    experts = readable(checkpoint("mixtral"), tmp_path / "experts")
    with pytest.raises(ArtifactError, match="under another name or in other pieces"):
        train(experts, tmp_path / "full", options(tmp_path), split=FULL)
    assert not (tmp_path / "full").exists()
