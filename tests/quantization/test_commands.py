"""Quantised models in every command: read as decoded values, merged into plain or into their own format."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from svdconvert import LoraOptions, MergeOptions, Run, SplitOptions, decompose, merge, to_lora
from svdconvert.commands.decompose import plan_decompose
from svdconvert.commands.inspect import inspect
from svdconvert.commands.verify import verify
from svdconvert.errors import CheckpointError, RecipeError, TargetError
from svdconvert.inputs.model import open_model
from svdconvert.quantization.view import DecodedSource, read_to_compute
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.quantization.checkpoints import KINDS, WRITTEN, plain, quantise, stored_tensors
from tests.visitor import Visitor

RUN = Run(device="cpu", threads=1)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="session")
def quantised(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The model in a format, written once. Tests must not write to it."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = quantise(original, tmp_path_factory.mktemp(kind) / "model", kind)
        return made[kind]

    return make


def decoded(model: Path) -> dict[str, Tensor]:
    """The matrices in float32."""
    source = open_model(str(model)).source
    assert isinstance(source, DecodedSource)
    return {name: read_to_compute(source, name) for name in source.coded}


def trained(decomposed: Path, out: Path, by: float = 0.05) -> Path:
    """The adapter of a decomposed directory with other factors B, without a manifest."""
    from safetensors.torch import save_file

    (folder,) = decomposed.glob("*_init")
    out.mkdir()
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor += by * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return out


def delta_of(adapter: Path, initial: Path, name: str) -> Tensor:
    """B A - B0 A0 in float64, at scale 1."""
    key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    total = 0.0
    for sign, folder in ((1.0, adapter), (-1.0, initial)):
        tensors = load_file(folder / "adapter_model.safetensors")
        total = total + sign * tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
    assert isinstance(total, Tensor)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_shows_its_plain_tensors(kind: str, quantised: Build, original: Path) -> None:
    shown = open_model(str(quantised(kind))).source.infos
    expected = open_model(str(original)).source.infos
    assert shown.keys() == expected.keys()
    assert all(
        (shown[name].shape, shown[name].dtype) == (info.shape, info.dtype) for name, info in expected.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_decompose_subtracts_from_the_decoded_values(kind: str, quantised: Build, tmp_path: Path) -> None:
    model = quantised(kind)
    decompose(model, tmp_path / "out", SplitOptions(rank=4), RUN)
    residual = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(tmp_path / "out" / "pissa_init" / "adapter_model.safetensors")
    for name, weight in decoded(model).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        product = factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
        expected = weight.double() - product
        error = (residual[name].double() - expected).abs()
        # One rounding to bfloat16, of what float32 arithmetic gives.
        assert (error <= expected.abs() * 2**-8 + 1e-6).all(), name
    assert verify(tmp_path / "out").passed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_merge_returns_the_decoded_values_rounded_once(
    kind: str, quantised: Build, tmp_path: Path
) -> None:
    model = quantised(kind)
    decompose(model, tmp_path / "out", SplitOptions(rank=4, targets=("attn.q", "mlp.down")), RUN)
    merge(tmp_path / "out", tmp_path / "merged", MergeOptions(side="base"), RUN)
    found = stored_tensors(tmp_path / "merged")
    for name, weight in decoded(model).items():
        assert torch.equal(found[name], weight.bfloat16()), name
    others = {
        name: tensor
        for name, tensor in stored_tensors(model).items()
        if name in found and name not in decoded(model)
    }
    assert all(torch.equal(found[name], tensor) for name, tensor in others.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(
        loaded.model.layers[0].mlp.down_proj.weight, found["model.layers.0.mlp.down_proj.weight"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_merge_rounds_once(kind: str, quantised: Build, tmp_path: Path) -> None:
    model = quantised(kind)
    decompose(model, tmp_path / "out", SplitOptions(rank=4), RUN)
    adapter = trained(tmp_path / "out", tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", MergeOptions(), RUN, base=model, init=tmp_path / "out" / "pissa_init")
    found = stored_tensors(tmp_path / "merged")
    twice = 0
    for name, weight in decoded(model).items():
        expected = weight.double() + delta_of(adapter, tmp_path / "out" / "pissa_init", name)
        distance = (found[name].double() - expected).abs()
        half_step = torch.frexp(found[name].float()).exponent.double().sub(9).exp2()
        assert (distance <= half_step * 1.001 + 1e-7).all(), name
        twice += int(((weight.bfloat16().double() - weight.double()) != 0).sum())
    assert twice or kind in ("fp8-tensor", "mxfp4"), "rounding the base first would give the same"


@pytest.mark.parametrize("kind", WRITTEN)
def test_an_untrained_merge_that_keeps_the_format_returns_all_bytes(
    kind: str, quantised: Build, tmp_path: Path
) -> None:
    model = quantised(kind)
    decompose(model, tmp_path / "out", SplitOptions(rank=4), RUN)
    merge(tmp_path / "out", tmp_path / "merged", MergeOptions(side="base", keep_format=True), RUN)
    expected = stored_tensors(model)
    found = stored_tensors(tmp_path / "merged")
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == json.loads(
        (model / "config.json").read_text()
    )


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_merge_that_keeps_the_format_changes_only_what_was_trained(
    kind: str, quantised: Build, tmp_path: Path
) -> None:
    model = quantised(kind)
    decompose(model, tmp_path / "out", SplitOptions(rank=4, targets=("mlp.down",)), RUN)
    adapter = trained(tmp_path / "out", tmp_path / "adapter", by=0.2)
    manifest = merge(
        adapter,
        tmp_path / "merged",
        MergeOptions(keep_format=True),
        RUN,
        base=model,
        init=tmp_path / "out" / "pissa_init",
    )
    before = stored_tensors(model)
    after = stored_tensors(tmp_path / "merged")
    assert after.keys() == before.keys()
    changed = {name for name, tensor in before.items() if not same_bytes(after[name], tensor)}
    assert changed and all(".mlp.down_proj." in name for name in changed)
    new = decoded(tmp_path / "merged")
    assert manifest.result.update is not None
    assert len(manifest.result.update.matrices) == 2
    for name, weight in decoded(model).items():
        if "down_proj" not in name:
            assert torch.equal(new[name], weight)
            continue
        intended = delta_of(adapter, tmp_path / "out" / "pissa_init", name)
        exact = weight.double() + intended
        realised = new[name].double() - weight.double()
        cosine = float((intended * realised).sum() / intended.norm() / realised.norm())
        assert manifest.result.update.matrices[name].cosine == pytest.approx(cosine, abs=1e-4)
        assert (new[name].double() - exact).norm() / exact.norm() < 0.2
    assert verify(tmp_path / "merged").passed


def test_low_cosines_are_reported_with_advice(quantised: Build, tmp_path: Path) -> None:
    said: list[str] = []
    decompose(quantised("int4"), tmp_path / "out", SplitOptions(rank=4), RUN)
    adapter = trained(tmp_path / "out", tmp_path / "adapter", by=0.001)
    run = Run(device="cpu", threads=1, notify=said.append)
    options = MergeOptions(keep_format=True)
    init = tmp_path / "out" / "pissa_init"
    merge(adapter, tmp_path / "merged", options, run, base=quantised("int4"), init=init)
    (advice,) = [line for line in said if "cosine" in line]
    assert "--dtype bfloat16" in advice and "to-lora" in advice


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(WRITTEN)))
def test_formats_that_cannot_be_written_are_refused_by_name(
    kind: str, quantised: Build, tmp_path: Path
) -> None:
    decompose(quantised(kind), tmp_path / "out", SplitOptions(rank=4), RUN)
    with pytest.raises(TargetError, match=f"is stored as {kind.upper()}.*leave out --keep-format"):
        merge(tmp_path / "out", tmp_path / "merged", MergeOptions(side="base", keep_format=True), RUN)
    assert not (tmp_path / "merged").exists()


def test_keep_format_is_refused_for_a_plain_base(original: Path, tmp_path: Path) -> None:
    decompose(original, tmp_path / "out", SplitOptions(rank=4), RUN)
    with pytest.raises(RecipeError, match="--keep-format changes nothing here: no weight of"):
        merge(tmp_path / "out", tmp_path / "merged", MergeOptions(side="base", keep_format=True), RUN)


def test_keep_format_and_dtype_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        MergeOptions(keep_format=True, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["nf4-double", "gptq"])
def test_to_lora_finds_a_lost_start_from_a_quantised_base(
    kind: str, quantised: Build, tmp_path: Path
) -> None:
    """Base minus residual has the start, as recovered; the LoRA is for the decoded base."""
    model = quantised(kind)
    decompose(model, tmp_path / "out", SplitOptions(rank=4, residual_dtype="float32"), RUN)
    (init,) = (tmp_path / "out").glob("*_init")
    adapter = trained(tmp_path / "out", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["init_lora_weights"] = "pissa"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    residual = tmp_path / "residual"
    residual.mkdir()
    for name in ("model.safetensors", "config.json"):
        (residual / name).write_bytes((tmp_path / "out" / name).read_bytes())
    to_lora(adapter, tmp_path / "lora", LoraOptions(), RUN, base=model, residual=residual)
    for name in decoded(model):
        expected = delta_of(adapter, init, name)
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        found = tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
        assert (found - expected).norm() / expected.norm() < 0.05


def test_inspect_shows_format_and_bits(quantised: Build) -> None:
    found = inspect(quantised("nf4")).details
    assert found["quantised"] == {"bitsandbytes NF4": 14}
    assert 4.5 < found["bits_per_quantised_weight"] < 5.2, (
        "4.5 and, in so small a matrix, the map and the text"
    )
    assert found["element_types"] == {"BF16": 21 - 0}
    assert inspect(quantised("fp8-block")).details["quantised"] == {"FP8 in blocks of 40 x 40": 14}


def test_a_plan_counts_decoded_bytes(quantised: Build, original: Path) -> None:
    expected = plan_decompose(str(original), SplitOptions(rank=4))
    found = plan_decompose(str(quantised("int4")), SplitOptions(rank=4))
    assert (found.read, found.written) == (expected.read, expected.written)


@pytest.mark.parametrize("method", ["hqq", "aqlm", "a" * 1000, 5, ["fp8"], None])
def test_unknown_methods_are_refused_by_name(method: Any, original: Path, tmp_path: Path) -> None:
    model = quantise(original, tmp_path / "model", "int8")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method} if method else {"other": 1}
    (model / "config.json").write_text(json.dumps(config))
    if method is None:
        assert inspect(model).details["quantised"] == {"INT8": 14}
        return
    with pytest.raises(
        TargetError, match=f"is quantised .quantisation .?{re.escape(str(method)[:20])}.* not supported"
    ):
        decompose(model, tmp_path / "out", SplitOptions(rank=4), RUN)
    assert "quantised" not in inspect(model).details


def test_codes_whose_scale_is_lost_are_refused(original: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = quantise(original, tmp_path / "model", "fp8-tensor")
    tensors = stored_tensors(model)
    lost = "model.layers.1.mlp.up_proj.weight_scale"
    del tensors[lost]
    for file in model.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(
        TargetError, match=r"no known format explains model.layers.1.mlp.up_proj.weight, stored as"
    ):
        decompose(model, tmp_path / "out", SplitOptions(rank=4, targets=("attn",)), RUN)


def test_a_plan_counts_the_memory_of_matrices_in_float32(quantised: Build, original: Path) -> None:
    plain_memory = plan_decompose(str(original), SplitOptions(rank=4)).memory
    found = plan_decompose(str(quantised("int4")), SplitOptions(rank=4)).memory
    largest = 96 * 64
    assert found - plain_memory in {count * largest * (4 - 2) for count in (3, 4)}


@pytest.mark.parametrize("kind", ["nf4-double", "int4"])
def test_a_streamed_model_is_decomposed_into_the_same_bytes(
    kind: str, quantised: Build, hub: Hub, alice: Visitor, tmp_path: Path
) -> None:
    hub.create("org/quantised", quantised(kind))
    decompose(quantised(kind), tmp_path / "local", SplitOptions(rank=4), RUN)
    out = tmp_path / "streamed"
    alice.succeeds("decompose", "org/quantised", "-o", out, "--rank", 4, "--threads", 1, "--stream")
    assert [name for name in alice.cached() if name.endswith(".safetensors")] == []
    for name in ("model.safetensors", "config.json", "pissa_init/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


def test_the_format_is_kept_when_shards_are_written_by_several_runs(quantised: Build, tmp_path: Path) -> None:
    """Every weight and its companions are in one shard, whatever the size of the shards."""
    model = quantised("nf4-double")
    decompose(model, tmp_path / "out", SplitOptions(rank=4), RUN)
    options = MergeOptions(side="base", keep_format=True, max_shard_size="4KB")
    merge(tmp_path / "out", tmp_path / "merged", options, RUN)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({*index.values()}) > 10
    for name, file in index.items():
        weight = name.partition(".weight")[0] + ".weight"
        assert index[weight] == file
    expected = stored_tensors(model)
    found = stored_tensors(tmp_path / "merged")
    assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())


def test_two_tensors_of_one_name_are_refused(original: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = quantise(original, tmp_path / "model", "mxfp4")
    tensors = stored_tensors(model)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64)
    for file in model.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.layers.0.mlp.up_proj.weight is stored twice"):
        decompose(model, tmp_path / "out", SplitOptions(rank=4), RUN)


def test_settings_of_modelopt_in_a_file_of_their_own_are_left_out(original: Path, tmp_path: Path) -> None:
    model = quantise(original, tmp_path / "model", "fp8-tensor")
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (model / "config.json").write_text(json.dumps(config))
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (model / "hf_quant_config.json").write_text(json.dumps(settings))
    decompose(model, tmp_path / "out", SplitOptions(rank=4), RUN)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("kind", ["fp8-block", "nf4", "nf4-double", "bnb8", "int4", "int8", "fp8-channel"])
def test_what_keeps_its_format_is_loaded_by_transformers_as_its_source_is(
    kind: str, quantised: Build, tmp_path: Path
) -> None:
    if KINDS[kind][1]["quant_method"] == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    if KINDS[kind][1]["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    model = quantised(kind)
    decompose(model, tmp_path / "out", SplitOptions(rank=4), RUN)
    adapter = trained(tmp_path / "out", tmp_path / "adapter", by=0.2)
    options = MergeOptions(keep_format=True)
    merge(adapter, tmp_path / "merged", options, RUN, base=model, init=tmp_path / "out" / "pissa_init")
    before = logits_of(model)
    after = logits_of(tmp_path / "merged")
    assert before.shape == after.shape
    assert not torch.equal(before, after)


def logits_of(model: Path) -> Tensor:
    """Logits of a few words."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).train()
    with torch.no_grad():
        logits = network(torch.arange(12)[None]).logits
    assert isinstance(logits, Tensor) and logits.isfinite().all()
    return logits
