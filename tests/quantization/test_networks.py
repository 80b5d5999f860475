"""Networks of quantised models: what train, eval and chat load."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svdconvert import (
    CombineOptions,
    MergeOptions,
    Run,
    SplitOptions,
    TrainOptions,
    combine,
    decompose,
    merge,
    train,
)
from svdconvert.commands.train import plan_train
from svdconvert.commands.verify import verify_merge
from svdconvert.inputs.model import open_model
from svdconvert.manifest.schema import read_manifest
from svdconvert.quantization.view import read_to_compute
from svdconvert.training.compat import reset_accelerate_state
from svdconvert.training.model.load import load_network
from svdconvert.training.model.quantised_linear import QuantisedLinear
from svdconvert.training.start import AdapterStart, open_training_start
from tests import tiny
from tests.mixtures import mixture
from tests.quantization.checkpoints import KINDS, plain, quantise, stored_tensors
from tests.reading import write_sums, write_tokenizer

RUN = Run(device="cpu", threads=1)
IDS = torch.arange(1, 20)[None]
EXPERT = re.compile(r"(_proj|\.w[123])\.weight$")


@pytest.fixture(autouse=True)
def _reset_accelerate() -> Iterator[None]:
    yield
    reset_accelerate_state()


def with_values_of(model: Path, directory: Path) -> Path:
    """A plain checkpoint with the decoded values, for transformers."""
    source = open_model(str(model)).source
    directory.mkdir()
    tensors = {name: source.read(name) for name in source.infos}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def quantised_mixture(family: str, directory: Path, kind: str) -> Path:
    """A mixture whose experts are one quantised matrix each in the files, and fused in the network."""
    model = mixture(family, directory.parent / f"{directory.name}-plain")
    store, settings = KINDS[kind]
    directory.mkdir()
    tensors = {}
    for name, tensor in stored_tensors(model).items():
        if not EXPERT.search(name):
            tensors[name] = tensor.bfloat16()
            continue
        for end, part in store(tensor.float()).items():
            tensors[name.removesuffix("weight") + end] = part.contiguous().clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return directory


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_that_the_network_fuses_are_decoded(family: str, tmp_path: Path) -> None:
    model = quantised_mixture(family, tmp_path / "model", "fp8-tensor")
    network = load_network(model, tiny.layout_of(model), torch.float32).eval()
    assert any(isinstance(layer, QuantisedLinear) for layer in network.modules())
    expected = AutoModelForCausalLM.from_pretrained(
        with_values_of(model, tmp_path / "values"), dtype=torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(network(input_ids=IDS).logits, expected(input_ids=IDS).logits)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = plain(tmp_path_factory.mktemp("plain") / "model")
    write_sums(directory.parent / "sums.jsonl")
    return directory


def test_generation_settings_of_the_directory_are_those_of_the_network(
    original: Path, tmp_path: Path
) -> None:
    model = quantise(original, tmp_path / "model", "int8")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    network = load_network(model, tiny.layout_of(model), None)
    assert getattr(network, "generation_config").eos_token_id == [2, 7]  # noqa: B009 (of nn.Module)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("fp8-block", "fp32"), ("int4", "fp32"), ("nf4", "fp32"), ("gptq", "fp32"), ("int4", "bf16")],
)
def test_a_method_with_a_residual_trains_on_any_format(
    kind: str, precision: Literal["fp32", "bf16"], original: Path, tmp_path: Path
) -> None:
    """The residual of a matrix takes the place of the quantised matrix, on any processor."""
    model = quantise(original, tmp_path / "model", kind)
    write_tokenizer(model)
    split = SplitOptions(rank=4, targets=("mlp.down",))
    start = open_training_start(str(model), split, None, RUN)
    assert isinstance(start, AdapterStart)
    options = TrainOptions(
        data=str(original.parent / "sums.jsonl"), steps=1, batch_size=2, max_length=48, precision=precision
    )
    estimate = plan_train(model, options, RUN, split=split)
    train(model, tmp_path / "trained", options, RUN, split=split)
    assert estimate.steps == read_manifest(tmp_path / "trained").options["steps"] == 1
    source = open_model(str(model)).source
    for name, residual in start.residuals.items():
        factors, scale = start.scaled_factors()[name.removesuffix(".weight")]
        total = residual.double() + factors.dense(scale).double()  # type: ignore[union-attr]
        weight = read_to_compute(source, name).double()
        assert ((total - weight).abs() <= 2**-8 * weight.abs() + 1e-3).all()
    merge(tmp_path / "trained", tmp_path / "merged", run=RUN)
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fine_tuned_model_is_plain(
    precision: Literal["fp32", "bf16"], original: Path, tmp_path: Path
) -> None:
    model = quantise(original, tmp_path / "model", "fp8-channel")
    write_tokenizer(model)
    options = TrainOptions(
        data=str(original.parent / "sums.jsonl"), steps=1, lr=1e-12, batch_size=2, precision=precision
    )
    train(model, tmp_path / "full", options, RUN, split=SplitOptions(method="full"))
    assert "quantization_config" not in json.loads((tmp_path / "full" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype="auto")
    source = open_model(str(model)).source
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, source.read(name), rtol=0.0, atol=1e-9)


def test_checkpoints_are_combined_by_their_decoded_values(original: Path, tmp_path: Path) -> None:
    """Rounded once, of the float32 sum of unrounded values."""
    one = quantise(original, tmp_path / "one", "fp8-block")
    two = quantise(original, tmp_path / "two", "int4")
    combine([one, two], tmp_path / "sum", CombineOptions(method="linear", weights=(0.25, 0.75)), RUN)
    sources = [open_model(str(model)).source for model in (one, two)]
    for name, tensor in load_file(tmp_path / "sum" / "model.safetensors").items():
        first, second = (read_to_compute(source, name).float() for source in sources)
        assert torch.equal(tensor, (0.25 * first + 0.75 * second).to(tensor.dtype)), name
    assert "quantization_config" not in (tmp_path / "sum" / "config.json").read_text()


def test_the_audit_of_a_merge_reads_the_unrounded_values_of_the_base(original: Path, tmp_path: Path) -> None:
    """A change that is smaller than the rounding of the decoded values is found."""
    model = quantise(original, tmp_path / "model", "fp8-block")
    decompose(model, tmp_path / "out", SplitOptions(rank=4, method="lora"), RUN)
    (init,) = (tmp_path / "out").glob("*_init")
    adapter = tmp_path / "adapter"
    shutil.copytree(init, adapter)
    tensors = load_file(init / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        tensor.add_(1e-4 if "lora_B" in name else 0.0)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    merge(adapter, tmp_path / "merged", MergeOptions(), RUN, base=str(model), init=str(init))
    audit = verify_merge(tmp_path / "merged", [model], adapter, RUN)
    assert audit.passed and audit.best.rules == {"one rounding": 14}
    untouched = merge(tmp_path / "out", tmp_path / "untouched", MergeOptions(side="base"), RUN)
    assert untouched.kind == "merged"
    assert not verify_merge(tmp_path / "untouched", [model], adapter, RUN).passed
