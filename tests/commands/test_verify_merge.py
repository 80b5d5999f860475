"""verify --merged: it knows the order of rounding, and finds what is not the merge."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from svdconvert import MergeOptions, Run, SplitOptions, TrainOptions, decompose, merge, train, verify_merge
from tests import stock
from tests.conftest import Build
from tests.program import svdconvert
from tests.reading import readable, write_sums

RUN = Run(device="cpu", threads=1)


@pytest.fixture(scope="module")
def home(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16, a LoRA that PEFT trained on it, and PEFT's merge of both."""
    home = tmp_path_factory.mktemp("audited")
    base = readable(checkpoint("llama", dtype=torch.bfloat16, tied=False), home / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapted.save_pretrained(home / "adapter")
    for name, safe in (("by-peft", False), ("by-peft-safely", True)):
        merged = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapted.peft_config["default"])
        merged.load_state_dict(adapted.state_dict())
        merged.merge_and_unload(safe_merge=safe).save_pretrained(home / name)
    merge(home / "adapter", home / "by-us", run=RUN, base=str(base), init="none")
    return home


def changed(home: Path, out: Path, change: Callable[[str, Tensor], Tensor], source: str = "by-us") -> Path:
    """A copy of a merge in which tensors were changed."""
    shutil.copytree(home / source, out)
    (out / "svdconvert.json").unlink(missing_ok=True)
    for file in out.glob("*.safetensors"):
        tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return out


def test_our_merge_is_one_rounding(home: Path) -> None:
    audit = verify_merge(home / "by-us", [home / "base"], home / "adapter", RUN)
    assert audit.passed and audit.best.rules == {"one rounding": 14}
    assert all(matrix.exact == 1.0 for matrix in audit.best.matrices)


def test_pefts_merge_of_a_float32_adapter_is_one_rounding_too(home: Path) -> None:
    audit = verify_merge(home / "by-peft", [home / "base"], home / "adapter", RUN)
    assert audit.passed and audit.best.rules == {"one rounding": 14}


def test_pefts_safe_merge_rounds_the_change_first(home: Path) -> None:
    audit = verify_merge(home / "by-peft-safely", [home / "base"], home / "adapter", RUN)
    assert audit.passed and audit.best.rules == {"PEFT's order": 14}
    assert all(0.5 < matrix.exact < 1.0 for matrix in audit.best.matrices)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_merge_in_another_element_type_passes(dtype: str, home: Path, tmp_path: Path) -> None:
    options = MergeOptions(dtype=dtype)
    merge(home / "adapter", tmp_path / "merged", options, RUN, base=str(home / "base"), init="none")
    audit = verify_merge(tmp_path / "merged", [home / "base"], home / "adapter", RUN)
    assert audit.passed and audit.best.rules == {"one rounding": 14}


def test_the_base_itself_does_not_contain_the_adapter(home: Path) -> None:
    audit = verify_merge(home / "base", [home / "base"], home / "adapter", RUN)
    assert not audit.passed and audit.best.rules == {"unchanged": 14}


def test_layers_without_the_adapter_are_named(home: Path, tmp_path: Path) -> None:
    before = stock.tensors(home / "base")
    lost = changed(home, tmp_path / "lost", lambda name, one: before[name] if "layers.1.mlp" in name else one)
    audit = verify_merge(lost, [home / "base"], home / "adapter", RUN)
    assert audit.best.rules == {"one rounding": 11, "unchanged": 3}
    assert sorted(fault.split()[0] for fault in audit.best.faults) == [
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("down", "gate", "up")
    ]
    ended = svdconvert("verify", "--merged", lost, "--base", home / "base", "--adapter", home / "adapter")
    assert ended.status == 1 and "model.layers.1.mlp.down_proj.weight is the base's" in ended.err + ended.out


@pytest.mark.parametrize("times", [2.0, -1.0, 0.25])
def test_a_wrong_scale_is_measured(times: float, home: Path, tmp_path: Path) -> None:
    before = stock.tensors(home / "base")
    wrong = changed(
        home,
        tmp_path / "wrong",
        lambda name, one: before[name].float() + times * (one.float() - before[name].float()),
    )
    audit = verify_merge(wrong, [home / "base"], home / "adapter", RUN)
    assert audit.best.rules == {"something else": 14}
    for matrix in audit.best.matrices:
        assert (
            matrix.times == pytest.approx(times, rel=0.05) and matrix.rest is not None and matrix.rest < 0.2
        )


def test_the_merge_of_a_dora_by_peft_is_audited_with_its_magnitudes(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    adapted.save_pretrained(tmp_path / "dora")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    audit = verify_merge(tmp_path / "merged", [home / "base"], tmp_path / "dora", RUN)
    assert audit.passed and audit.best.rules == {"one rounding": 14}
    assert verify_merge(home / "base", [home / "base"], tmp_path / "dora", RUN).best.rules == {
        "unchanged": 14
    }
    audit = verify_merge(home / "by-peft", [home / "base"], tmp_path / "dora", RUN)
    assert audit.best.rules == {"something else": 14}


def test_noise_is_something_else(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    noisy = changed(
        home,
        tmp_path / "noisy",
        lambda name, one: (one + torch.randn(one.shape).to(one)) if "q_proj" in name else one,
    )
    audit = verify_merge(noisy, [home / "base"], home / "adapter", RUN)
    assert audit.best.rules == {"one rounding": 12, "something else": 2}
    assert all("unexplained" in fault for fault in audit.best.faults)


def test_tensors_that_the_adapter_does_not_change_must_be_the_bases(home: Path, tmp_path: Path) -> None:
    wrong = changed(
        home, tmp_path / "wrong", lambda name, one: one * 2 if name == "model.norm.weight" else one
    )
    audit = verify_merge(wrong, [home / "base"], home / "adapter", RUN)
    assert audit.best.faults == [
        "model.norm.weight differs from the base, and the adapter has nothing for it"
    ]


def test_the_base_that_fits_is_found(home: Path, checkpoint: Build, tmp_path: Path) -> None:
    other = changed(home, tmp_path / "other", lambda name, one: one + 0.5, source="base")
    unlike = checkpoint("qwen2")
    audit = verify_merge(home / "by-us", [other, unlike, home / "base"], home / "adapter", RUN)
    assert audit.passed and audit.best.base == str(home / "base")
    assert [base.passed for base in audit.bases] == [False, False, True]
    words = ["verify", "--merged", home / "by-us", "--adapter", home / "adapter"]
    shown = svdconvert(*words, "--base", other, "--base", home / "base")
    assert shown.status == 0 and "yes" in shown.out


def test_an_adapter_that_started_as_a_slice_is_audited_on_its_base(checkpoint: Build, tmp_path: Path) -> None:
    base = readable(checkpoint("llama", dtype=torch.bfloat16, tied=False), tmp_path / "base")
    data = write_sums(tmp_path / "rows.jsonl")
    decompose(base, tmp_path / "pissa", SplitOptions(rank=4), RUN)
    options = TrainOptions(
        data=str(data), steps=2, batch_size=2, max_length=48, lr=0.1, train_also=("norms",)
    )
    train(tmp_path / "pissa", tmp_path / "trained", options, RUN)
    merge(tmp_path / "trained", tmp_path / "merged", run=RUN)
    audit = verify_merge(tmp_path / "merged", [base], tmp_path / "trained", RUN)
    assert audit.passed and audit.best.rules == {"one rounding": 14}


def test_wrong_words_are_refused(home: Path) -> None:
    merged, base, adapter = home / "by-us", home / "base", home / "adapter"
    for words in (
        ["verify", merged, "--merged", merged, "--base", base, "--adapter", adapter],
        ["verify", "--merged", merged, "--base", base],
        ["verify", "--merged", merged, "--adapter", adapter],
        ["verify", merged, "--adapter", adapter],
        ["verify", merged, "--base", base, "--base", base],
        ["verify"],
    ):
        assert svdconvert(*words).status == 2


def test_a_missing_tensor_is_named(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "by-us", tmp_path / "less")
    (tmp_path / "less" / "svdconvert.json").unlink()
    file = next((tmp_path / "less").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    audit = verify_merge(tmp_path / "less", [home / "base"], home / "adapter", RUN)
    assert audit.best.faults == ["model.layers.0.mlp.up_proj.weight is missing"]


def test_other_settings_of_the_merged_model_are_named(home: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(home / "by-us", merged)
    (merged / "svdconvert.json").unlink()
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    said: list[str] = []
    verify_merge(merged, [home / "base"], home / "adapter", Run(device="cpu", notify=said.append))
    assert ["differ in rms_norm_eps" in one for one in said] == [True]
