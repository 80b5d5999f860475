"""decompose --residual-format nf4: what it writes, and that every command goes on from it."""

import json
from pathlib import Path

import pytest
import torch

from svdconvert.commands.decompose import decompose, plan_decompose
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.commands.train import train
from svdconvert.commands.verify import verify
from svdconvert.config.execution import Run
from svdconvert.config.options import MergeOptions, SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError, TargetError
from svdconvert.manifest.schema import read_manifest
from tests import tiny
from tests.conftest import Build
from tests.program import content
from tests.reading import readable, write_sums
from tests.rwkv6 import random_model, save
from tests.stock import tensors

NF4 = SplitOptions(rank=4, residual_format="nf4")


@pytest.fixture(scope="module")
def base(checkpoint: Build) -> Path:
    return checkpoint("llama", dtype=torch.bfloat16, tied=False)


@pytest.fixture(scope="module")
def decomposed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nf4") / "out"
    decompose(base, out, NF4)
    return out


def test_every_target_is_stored_in_four_bits_and_nothing_else(base: Path, decomposed: Path) -> None:
    before = tensors(base)
    after = tensors(decomposed)
    for name, weight in before.items():
        if ".self_attn." in name or ".mlp." in name:
            assert after[name].dtype == torch.uint8
            assert after[name].numel() == weight.numel() // 2
            assert f"{name}.quant_state.bitsandbytes__nf4" in after
        else:
            assert torch.equal(after[name], weight)


def test_config_json_tells_transformers_what_is_quantised(decomposed: Path) -> None:
    config = json.loads((decomposed / "config.json").read_text())
    entry = config["quantization_config"]
    assert entry["quant_method"] == "bitsandbytes"
    assert entry["load_in_4bit"] is True
    assert {"lm_head", "model.embed_tokens"} <= {*entry["llm_int8_skip_modules"]}
    assert not any("proj" in name for name in entry["llm_int8_skip_modules"])
    assert config["dtype"] == "bfloat16"


def test_other_linear_layers_are_named_as_not_quantised(base: Path, tmp_path: Path) -> None:
    decompose(base, tmp_path / "out", SplitOptions(rank=4, residual_format="nf4", targets=("attn",)))
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.gate_proj" in entry["llm_int8_skip_modules"]
    assert "model.layers.1.self_attn.q_proj" not in entry["llm_int8_skip_modules"]


def test_experts_keep_a_plain_residual_and_are_not_quantised(checkpoint: Build, tmp_path: Path) -> None:
    decompose(checkpoint("mixtral"), tmp_path / "out", NF4)
    stored = tensors(tmp_path / "out")
    experts = [name for name in stored if ".experts." in name]
    assert experts and all(stored[name].dtype == torch.bfloat16 for name in experts)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert any(name.endswith(".experts") for name in entry["llm_int8_skip_modules"])
    assert any(name.endswith(".gate") for name in entry["llm_int8_skip_modules"])
    with pytest.raises(TargetError, match="fuses"):
        decompose(
            checkpoint("mixtral"),
            tmp_path / "experts",
            SplitOptions(rank=2, residual_format="nf4", targets=("*experts*",)),
        )


def test_verify_recomputes_the_ratios_and_finds_a_wrong_claim(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose(base, out, SplitOptions(rank=4, residual_format="nf4", nuclear_ratio="1"))
    manifest = read_manifest(out)
    measured = [m for m in manifest.matrices.values() if m.quantised and m.quantised.nuclear_reduction]
    assert len(measured) == len({matrix.role for matrix in manifest.matrices.values()})
    report = verify(out, nuclear_ratio="all")
    assert report.passed
    assert report.reductions["nuclear"]["all"] > 0.5
    assert report.reductions["Frobenius"].keys() == {"all", *(m.role for m in manifest.matrices.values())}
    values = json.loads((out / "svdconvert.json").read_text())
    name = next(iter(values["matrices"]))
    values["matrices"][name]["quantised"]["reduction"] += 0.01
    (out / "svdconvert.json").write_text(json.dumps(values))
    assert any("below that of NF4 instead of" in fault for fault in verify(out).faults)


def test_verify_refuses_the_ratio_of_a_plain_residual(base: Path, tmp_path: Path) -> None:
    decompose(base, tmp_path / "out", SplitOptions(rank=4))
    with pytest.raises(RecipeError, match="no residual is stored in 4 bits"):
        verify(tmp_path / "out", nuclear_ratio="all")
    decompose(base, tmp_path / "nf4", NF4)
    with pytest.raises(RecipeError, match="neither all nor a number"):
        verify(tmp_path / "nf4", nuclear_ratio="some")


@pytest.mark.parametrize("method", ["pissa", "sorsa", "lora"])
@pytest.mark.parametrize("double", [False, True])
def test_an_untrained_merge_returns_the_base(base: Path, tmp_path: Path, method: str, double: bool) -> None:
    out = tmp_path / "out"
    decompose(base, out, SplitOptions(rank=4, method=method, residual_format="nf4", double_quant=double))
    merge(out, tmp_path / "merged")
    before = tensors(base)
    merged = tensors(tmp_path / "merged")
    assert before.keys() == merged.keys()
    assert all(torch.equal(before[name], merged[name]) for name in before)
    merge(out, tmp_path / "residual", MergeOptions(side="residual"))
    found = tensors(tmp_path / "residual")
    for name, matrix in read_manifest(out).matrices.items():
        error = (found[name].double() - before[name].double()).norm() / before[name].double().norm()
        assert float(error) == pytest.approx(matrix.error, rel=0.02)
    assert "quantization_config" not in json.loads((tmp_path / "residual" / "config.json").read_text())


def test_training_in_memory_and_from_the_directory_is_the_same(base: Path, tmp_path: Path) -> None:
    model = readable(base, tmp_path / "model")
    data = str(write_sums(tmp_path / "rows.jsonl"))
    options = TrainOptions(data=data, steps=2, batch_size=2, max_length=48, lr=1e-3, precision="fp32")
    decompose(model, tmp_path / "out", NF4)
    train(tmp_path / "out", tmp_path / "trained", options)
    train(model, tmp_path / "direct", options, split=NF4)
    one = tensors(tmp_path / "trained")
    other = tensors(tmp_path / "direct")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    merge(tmp_path / "trained", tmp_path / "merged", MergeOptions(side="residual"))
    to_lora(tmp_path / "trained", tmp_path / "lora")
    assert verify(tmp_path / "trained").passed


def test_a_qlora_trains_on_a_plain_nf4_base(base: Path, tmp_path: Path) -> None:
    model = readable(base, tmp_path / "model")
    data = str(write_sums(tmp_path / "rows.jsonl"))
    options = TrainOptions(data=data, steps=2, batch_size=2, max_length=48, lr=1e-3, precision="fp32")
    lora = SplitOptions(rank=4, method="lora")
    decompose(model, tmp_path / "qlora", SplitOptions(rank=4, method="lora", residual_format="nf4"))
    plain = tmp_path / "nf4-base"
    plain.mkdir()
    for file in (tmp_path / "qlora").iterdir():
        if file.is_file() and file.name != "svdconvert.json":
            (plain / file.name).write_bytes(file.read_bytes())
    train(tmp_path / "qlora", tmp_path / "one", options)
    train(plain, tmp_path / "two", options, split=lora)
    one = tensors(tmp_path / "one")
    two = tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    merge(tmp_path / "two", tmp_path / "merged")
    assert tensors(tmp_path / "merged").keys() == tensors(base).keys()


def test_companions_stay_in_the_shard_of_their_weight(checkpoint: Build, tmp_path: Path) -> None:
    decompose(
        checkpoint("llama", shard=tiny.SHARDED),
        tmp_path / "out",
        SplitOptions(rank=4, residual_format="nf4", max_shard_size="3KB"),
    )
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({*weight_map.values()}) > 3
    for name, file in weight_map.items():
        weight, companion, _ = name.partition(".weight.")
        assert not companion or weight_map[f"{weight}.weight"] == file
    assert verify(tmp_path / "out").passed


def test_the_same_options_give_the_same_bytes_with_double_quantisation(base: Path, tmp_path: Path) -> None:
    options = SplitOptions(rank=4, residual_format="nf4", double_quant=True, quant_iterations=2)
    for name in ("one", "two"):
        decompose(base, tmp_path / name, options)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_the_plan_states_the_size_that_is_written(base: Path, tmp_path: Path) -> None:
    planned = plan_decompose(base, NF4)
    decompose(base, tmp_path / "out", NF4)
    files = [path for path in (tmp_path / "out").rglob("*.safetensors")]
    written = sum(path.stat().st_size for path in files)
    assert planned.written <= written <= planned.written + 16384 * len(files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_chain(checkpoint: Build, tmp_path: Path, dtype: torch.dtype) -> None:
    model = checkpoint("llama", dtype=dtype, tied=False)
    decompose(model, tmp_path / "out", NF4)
    assert verify(tmp_path / "out").passed
    merge(tmp_path / "out", tmp_path / "merged")
    before = tensors(model)
    assert all(torch.equal(before[name], weight) for name, weight in tensors(tmp_path / "merged").items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quant_start": "loftq"}, "--quant-start"),
        ({"quant_iterations": 2}, "--quant-iterations"),
        ({"double_quant": True}, "--double-quant"),
        ({"nuclear_ratio": "all"}, "--nuclear-ratio"),
        ({"residual_format": "nf4", "residual_dtype": "float32"}, "--residual-dtype"),
        ({"residual_format": "nf4", "method": "lora", "quant_iterations": 2}, "start at zero"),
        ({"residual_format": "nf4", "method": "lora", "copy_base": True}, "--copy-base"),
    ],
)
def test_options_without_effect_are_refused(
    base: Path, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        decompose(base, tmp_path / "out", SplitOptions(rank=4, **options), Run())  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_model_that_transformers_cannot_load_in_four_bits_is_refused(tmp_path: Path) -> None:
    model = save(random_model(), tmp_path / "model.pth")
    with pytest.raises(TargetError, match="loads no 4-bit weights"):
        decompose(model, tmp_path / "out", SplitOptions(rank=2, residual_format="nf4"))
