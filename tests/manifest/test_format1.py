"""Every command reads what earlier versions wrote, with manifests of format 1.

tests/data/make_format1.py says how the directories were made. Their manifests name places below /models that
do not exist: the base is always given.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdconvert import (
    ConvertOptions,
    MergeOptions,
    Run,
    TrainOptions,
    convert,
    decompose,
    inspect,
    merge,
    read_manifest,
    to_lora,
    train,
    verify,
)
from svdconvert.config.options import SplitOptions
from tests.data.make_format1 import FORMAT1, STEPS
from tests.loopback_hub.server import Hub
from tests.program import succeeded
from tests.reading import write_sums
from tests.stock import WEIGHTS, same_bits, tensors
from tests.visitor import Visitor

BASE = FORMAT1 / "base"
RUN = Run(device="cpu", threads=1)
KINDS = {
    "decomposed": "decomposed",
    "trained": "trained",
    "classifier": "trained",
    "merged": "merged",
    "full": "finetuned",
    "lora": "lora",
    "lora-truncated": "lora",
    "converted": "converted",
}
"""Directory -> kind. Format 1 called a fine-tuned one merged, with the method full."""
ROUNDING = 2.0**-8
"""Half a unit in the last place of bfloat16, relative."""


def product(adapter: Path, module: str) -> Tensor:
    """Scale times B A of one module in float64, from PEFT's files."""
    factors = load_file(adapter / WEIGHTS)
    config = json.loads((adapter / "adapter_config.json").read_text())
    right, left = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return config["lora_alpha"] / config["r"] * left @ right


def adapted_tensors() -> dict[str, str]:
    """Tensor of the base -> module, for the matrices that the fixtures adapt."""
    names = [name for name in tensors(BASE) if name.endswith("_proj.weight")]
    assert len(names) == 7
    return {name: name.removesuffix(".weight") for name in names}


def change(module: str, adapter: Path = FORMAT1 / "trained") -> Tensor:
    """What training changed, s B A - s0 B0 A0, in float64."""
    return product(adapter, module) - product(adapter / "pissa_init", module)


def assert_is_the_base_plus(directory: Path, changes: dict[str, Tensor]) -> None:
    """Every adapted tensor is the base's plus its change, rounded once; all others are the base's."""
    found, base = tensors(directory), tensors(BASE)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        if name not in changes:
            assert same_bits(tensor, base[name])
            continue
        wanted = base[name].double() + changes[name]
        assert ((tensor.double() - wanted).abs() <= ROUNDING * wanted.abs() + 1e-6).all(), name


@pytest.fixture
def changes() -> dict[str, Tensor]:
    found = {name: change(module) for name, module in adapted_tensors().items()}
    assert all(float(matrix.abs().max()) > 0.01 for matrix in found.values())
    return found


@pytest.mark.parametrize("name", KINDS)
def test_the_fixtures_are_of_format_1_and_name_a_neutral_place(name: str) -> None:
    values = json.loads((FORMAT1 / name / "svdconvert.json").read_text())
    assert values["format"] == 1
    assert values["base"]["location"] == ("/models/rwkv6.pth" if name == "converted" else "/models/base")


@pytest.mark.parametrize("name", KINDS)
def test_inspect_says_what_each_is(name: str) -> None:
    found = inspect(FORMAT1 / name)
    assert found.kind == KINDS[name]
    assert found.details["written_by"] == "svdconvert 0.1.0"
    assert str(found.details["base"]).startswith("/models/")
    assert found.next


def test_inspect_shows_the_options_that_were_chosen() -> None:
    assert inspect(FORMAT1 / "decomposed").details["options"]["rank"] == 2
    assert inspect(FORMAT1 / "trained").details["options"]["steps"] == 2
    succeeded("inspect", FORMAT1 / "lora-truncated")


def test_results_are_read_apart_from_options() -> None:
    merged = read_manifest(FORMAT1 / "merged")
    assert merged.result.side == "base"
    assert len(merged.result.update.matrices) == 7
    exact, truncated = (read_manifest(FORMAT1 / name) for name in ("lora", "lora-truncated"))
    assert (exact.result.rank, exact.result.truncation, exact.options["rank"]) == (4, None, None)
    assert (truncated.result.rank, truncated.options["rank"]) == (1, 1)
    assert 0.1 < truncated.result.truncation.error < 0.9
    head = read_manifest(FORMAT1 / "classifier").result.head
    assert head["id2label"] == {"0": "False", "1": "True"}
    for name in KINDS:
        assert not {"update", "truncation", "head"} & read_manifest(FORMAT1 / name).options.keys()


def test_a_fine_tuned_model_is_no_merged_adapter() -> None:
    manifest = read_manifest(FORMAT1 / "full")
    assert (manifest.kind, manifest.method) == ("finetuned", "full")
    assert manifest.options["steps"] == 2
    before, after = tensors(BASE), tensors(FORMAT1 / "full")
    assert before.keys() == after.keys()
    assert not any(same_bits(after[name], before[name]) for name in adapted_tensors())


@pytest.mark.parametrize("name", KINDS)
def test_verify_finds_every_tensor_as_it_was_written(name: str) -> None:
    report = verify(FORMAT1 / name, RUN)
    assert report.faults == []
    assert report.tensors == sum(len(load_file(file)) for file in (FORMAT1 / name).rglob("*.safetensors"))


def test_verify_compares_the_decomposed_one_with_its_base() -> None:
    report = verify(FORMAT1 / "decomposed", RUN, base=str(BASE))
    assert report.passed
    assert report.matrices == 7
    assert 0 < report.worst < ROUNDING


def test_merging_the_untrained_adapter_gives_the_base_bit_for_bit(tmp_path: Path) -> None:
    merge(FORMAT1 / "decomposed", tmp_path / "out", run=RUN, base=str(BASE))
    assert_is_the_base_plus(tmp_path / "out", {})


def test_merge_adds_to_the_base_what_training_changed(tmp_path: Path, changes: dict[str, Tensor]) -> None:
    merge(FORMAT1 / "trained", tmp_path / "out", run=RUN, base=str(BASE))
    assert_is_the_base_plus(tmp_path / "out", changes)
    assert_is_the_base_plus(FORMAT1 / "merged", changes)


def test_merge_adds_the_adapter_to_the_residual(tmp_path: Path, changes: dict[str, Tensor]) -> None:
    options = MergeOptions(side="residual")
    merge(FORMAT1 / "trained", tmp_path / "out", options, RUN, residual=str(FORMAT1 / "decomposed"))
    found, residual = tensors(tmp_path / "out"), tensors(FORMAT1 / "decomposed")
    for name, module in adapted_tensors().items():
        wanted = residual[name].double() + product(FORMAT1 / "trained", module)
        assert ((found[name].double() - wanted).abs() <= ROUNDING * wanted.abs() + 1e-6).all(), name


def test_merge_writes_the_head_that_was_trained_into_the_config(tmp_path: Path) -> None:
    merge(FORMAT1 / "classifier", tmp_path / "out", run=RUN, base=str(BASE))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "False", "1": "True"}
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    trained = load_file(FORMAT1 / "classifier" / WEIGHTS)["base_model.model.score.weight"]
    assert same_bits(tensors(tmp_path / "out")["score.weight"], trained)


@pytest.mark.parametrize("name", ["lora", "lora-truncated"])
def test_merge_adds_a_lora_to_the_base(name: str, tmp_path: Path) -> None:
    merge(FORMAT1 / name, tmp_path / "out", run=RUN, base=str(BASE))
    products = {tensor: product(FORMAT1 / name, module) for tensor, module in adapted_tensors().items()}
    assert_is_the_base_plus(tmp_path / "out", products)


def test_to_lora_writes_what_training_changed(tmp_path: Path) -> None:
    to_lora(FORMAT1 / "trained", tmp_path / "out", run=RUN)
    for module in adapted_tensors().values():
        for lora in (tmp_path / "out", FORMAT1 / "lora"):
            torch.testing.assert_close(product(lora, module), change(module), rtol=0, atol=1e-6)


def test_train_starts_from_the_decomposed_one_and_ends_in_the_same_factors(tmp_path: Path) -> None:
    data = str(write_sums(tmp_path / "sums.jsonl"))
    train(FORMAT1 / "decomposed", tmp_path / "out", TrainOptions(data=data, **STEPS), RUN)
    found, recorded = load_file(tmp_path / "out" / WEIGHTS), load_file(FORMAT1 / "trained" / WEIGHTS)
    assert found.keys() == recorded.keys()
    for name, factor in recorded.items():
        torch.testing.assert_close(found[name], factor, rtol=0, atol=1e-4)


def test_what_was_merged_is_decomposed_again(tmp_path: Path) -> None:
    decompose(FORMAT1 / "merged", tmp_path / "out", SplitOptions(rank=2), RUN)
    report = verify(tmp_path / "out", RUN)
    assert report.passed
    assert report.matrices == 7


def test_what_was_converted_is_converted_back_to_the_bytes_of_its_source(tmp_path: Path) -> None:
    convert(FORMAT1 / "converted", tmp_path / "out", ConvertOptions(layout="blinkdl"), RUN)
    (written,) = (tmp_path / "out").glob("*.pth")
    found, source = (torch.load(file, weights_only=True) for file in (written, FORMAT1 / "rwkv6.pth"))
    assert list(found) == list(source)
    assert all(same_bits(found[name], tensor) for name, tensor in source.items())


def test_an_overwritten_directory_may_be_of_format_1(tmp_path: Path) -> None:
    out = shutil.copytree(FORMAT1 / "merged", tmp_path / "out")
    merge(FORMAT1 / "lora", out, run=Run(device="cpu", threads=1, overwrite=True), base=str(BASE))
    assert read_manifest(out).kind == "merged"


@pytest.mark.processes
@pytest.mark.sweep
def test_push_writes_a_card_for_each(hub: Hub, alice: Visitor) -> None:
    hub.create("org/base", BASE)
    for name in ("decomposed", "trained", "merged", "full", "lora-truncated"):
        residual = ["--residual", "alice/decomposed"] if name == "trained" else []
        alice.succeeds("push", FORMAT1 / name, f"alice/{name}", "--base", "org/base", *residual)
        card = hub.repositories[f"alice/{name}"].read("README.md").decode()
        assert ("base_model" in card) == (name != "decomposed")
        assert "org/base" in card
        assert "/models" not in card
        assert ("adapter merged" in card) == (name == "merged")
