"""What a LoRA leaves out of a model that was trained on a residual in 4 bits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdconvert import LoraOptions, Run, SplitOptions, decompose, to_lora
from svdconvert.inputs.model import open_model
from svdconvert.manifest.results import LoraResult
from svdconvert.quantization.view import read_to_compute
from tests.conftest import Build


def test_what_the_lora_misses_on_the_untouched_base_is_said(checkpoint: Build, tmp_path: Path) -> None:
    said: list[str] = []
    base = checkpoint("llama")
    out = tmp_path / "out"
    decompose(base, out, SplitOptions(rank=4, residual_format="nf4"), Run(device="cpu"))
    manifest = to_lora(out, tmp_path / "lora", LoraOptions(), Run(device="cpu", notify=said.append))
    residual = open_model(str(out)).source
    original = open_model(str(base)).source
    factors = load_file(out / "pissa_init" / "adapter_model.safetensors")
    errors = {}
    for name in (name for name in original.infos if "_proj" in name):
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        product = factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
        weight = original.read(name).double()
        missed = weight - read_to_compute(residual, name).double() - product
        errors[name] = float(torch.linalg.matrix_norm(missed) / torch.linalg.matrix_norm(weight))
    assert isinstance(manifest.result, LoraResult)
    assert manifest.result.missed == pytest.approx(sum(errors.values()) / len(errors), rel=1e-3)
    (sentence,) = [line for line in said if "LoRA misses" in line]
    assert max(errors, key=errors.__getitem__) in sentence


def test_a_plain_residual_misses_nothing(checkpoint: Build, tmp_path: Path) -> None:
    decompose(checkpoint("llama"), tmp_path / "out", SplitOptions(rank=4), Run(device="cpu"))
    manifest = to_lora(tmp_path / "out", tmp_path / "lora", LoraOptions(), Run(device="cpu"))
    assert isinstance(manifest.result, LoraResult)
    assert manifest.result.missed is None
