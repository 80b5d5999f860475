"""RWKV-PEFT's adapter files, read by merge and to-lora and written, compared with its formulas in numpy."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.oracle import needs_rwkv, rwkv_logits
from tests.models.test_rwkv6 import TOKENS
from tests.program import refused, succeeded
from tests.rwkv6 import random_model, save
from tests.test_rwkv6_layouts import read

RANK = 4
ALPHA = 10.0
MODULES = [
    f"blocks.{layer}.{module}"
    for layer in range(2)
    for module in ("att.key", "att.gate", "ffn.key", "ffn.value")
]
TRAINED_IN_FULL = "blocks.1.att.time_decay"


class Files:
    """What RWKV-PEFT writes: the base, the initial adapter of PiSSA, and the trained adapter."""

    def __init__(self, directory: Path, prefix: str) -> None:
        noise = torch.Generator().manual_seed(5)
        tensors = random_model()
        self.base = save(tensors, directory / "base.pth", torch.float32)
        start: OrderedDict[str, Tensor] = OrderedDict()
        end: OrderedDict[str, Tensor] = OrderedDict()
        self.pissa = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        self.lora = dict(self.pissa)
        for module in MODULES:
            weight = tensors[f"{module}.weight"]
            first = [0.1 * torch.randn(RANK, weight.shape[1], generator=noise)]
            first.append(0.1 * torch.randn(weight.shape[0], RANK, generator=noise))
            last = [factor + 0.05 * torch.randn(factor.shape, generator=noise) for factor in first]
            for letter, then, now in zip("AB", first, last, strict=True):
                start[f"model.{module}.init_lora_{letter}"] = then
                end[f"{prefix}{module}.lora_{letter}"] = now
            (a0, b0), (a, b) = ([factor.double().numpy() for factor in pair] for pair in (first, last))
            name = f"{module}.weight"
            self.pissa[name] = self.pissa[name] - b0 @ a0 + b @ a
            self.lora[name] = self.lora[name] + b @ a * ALPHA / RANK
        end[prefix + TRAINED_IN_FULL] = tensors[TRAINED_IN_FULL] + 1
        for values in (self.pissa, self.lora):
            values[TRAINED_IN_FULL] = values[TRAINED_IN_FULL] + 1
        self.start, self.end = directory / "init_pissa.pth", directory / "rwkv-0.pth"
        torch.save(start, self.start)
        torch.save(end, self.end)


@pytest.fixture(params=["", "model."], ids=["bare", "wrapped"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return Files(tmp_path, request.param)


def check(path: Path, wanted: dict[str, "np.ndarray"]) -> None:
    found = read(path / "model.pth")
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert np.abs(found[name].double().numpy() - value).max() <= 1e-6 * max(1.0, np.abs(value).max()), (
            name
        )


def test_pissa_is_merged_with_its_initial_adapter(files: Files, tmp_path: Path) -> None:
    succeeded("merge", files.end, "-o", tmp_path / "out", "--base", files.base, "--init", files.start)
    check(tmp_path / "out", files.pissa)


def test_a_lora_is_merged_with_its_alpha(files: Files, tmp_path: Path) -> None:
    succeeded("merge", files.end, "-o", tmp_path / "out", "--base", files.base, "--alpha", ALPHA)
    check(tmp_path / "out", files.lora)


def test_files_without_a_scale_are_combined_and_merged_together_with_one_alpha(
    files: Files, tmp_path: Path
) -> None:
    adapters = (files.end, files.end, "--weights", "0.25,0.75", "--alpha", ALPHA)
    succeeded("combine", *adapters, "-o", tmp_path / "lora")
    succeeded("merge", tmp_path / "lora", "-o", tmp_path / "one", "--base", files.base)
    check(tmp_path / "one", files.lora)
    succeeded("merge", *adapters, "-o", tmp_path / "all", "--base", files.base)
    check(tmp_path / "all", files.lora)
    refused(
        "combine", files.end, files.end, "-o", tmp_path / "no", words=["does not store its scale", "--alpha"]
    )
    words = ["--alpha changes nothing here"]
    refused("combine", tmp_path / "lora", tmp_path / "lora", "-o", tmp_path / "no", "--alpha", 3, words=words)


@pytest.mark.parametrize("kind", ["peft", "rwkv-peft"])
def test_to_lora_and_merge_make_the_same_change(kind: str, files: Files, tmp_path: Path) -> None:
    said = succeeded("to-lora", files.end, "-o", tmp_path / "lora", "--init", files.start, "--format", kind)
    # The file names no base, and transformers has no model with these module names.
    for out in (said.out, succeeded("inspect", tmp_path / "lora").out):
        assert "-o MERGED --base BASE" in out and "PeftModel" not in out
    succeeded("verify", tmp_path / "lora")
    succeeded("merge", tmp_path / "lora", "-o", tmp_path / "out", "--base", files.base)
    check(tmp_path / "out", files.pissa)


def test_what_is_written_is_merged_by_the_formula_of_rwkv_peft(files: Files, tmp_path: Path) -> None:
    command = ("to-lora", files.end, "-o", tmp_path / "l", "--init", files.start)
    said = succeeded(*command, "--format", "rwkv-peft")
    assert f"lora_alpha {2 * RANK}" in said.out
    written, base = read(tmp_path / "l" / "rwkv_lora.pth"), read(files.base)
    assert {name for name in written if "lora_" not in name} == {TRAINED_IN_FULL}
    for module in MODULES:
        a, b = (written[f"{module}.lora_{letter}"].double().numpy() for letter in "AB")
        assert a.shape[0] == 2 * RANK
        merged = base[f"{module}.weight"].double().numpy() + b @ a * (2 * RANK) / a.shape[0]
        assert np.abs(merged - files.pissa[f"{module}.weight"]).max() < 1e-6


@pytest.mark.slow
@needs_rwkv
def test_an_adapter_is_merged_into_a_base_of_another_layout(files: Files, tmp_path: Path) -> None:
    tensors = read(files.end)
    torch.save(OrderedDict((n, t) for n, t in tensors.items() if "lora_" in n), tmp_path / "matrices.pth")
    succeeded("convert", files.base, "-o", tmp_path / "fla", "--layout", "fla")
    for name, base in (("one", files.base), ("other", tmp_path / "fla")):
        command = ("merge", tmp_path / "matrices.pth", "-o", tmp_path / name, "--base", base)
        succeeded(*command, "--init", files.start)
    succeeded("convert", tmp_path / "other", "-o", tmp_path / "back", "--layout", "blinkdl")
    one, back = read(tmp_path / "one" / "model.pth"), read(tmp_path / "back" / "model.pth")
    assert all(torch.equal(back[name], one[name]) for name in one)
    logits = rwkv_logits(tmp_path / "one" / "model.pth", tmp_path, TOKENS)[0]
    assert (logits - rwkv_logits(files.base, tmp_path, TOKENS)[0]).abs().max() > 1e-3


def test_an_adapter_of_the_hf_layout_is_written_in_the_format_of_rwkv_peft(tmp_path: Path) -> None:
    model = save(random_model(), tmp_path / "m.pth", torch.float32)
    succeeded("convert", model, "-o", tmp_path / "hf", "--layout", "hf")
    succeeded("decompose", tmp_path / "hf", "-o", tmp_path / "out", "--rank", RANK, "--targets", "att.key")
    succeeded("to-lora", tmp_path / "out", "-o", tmp_path / "lora", "--format", "rwkv-peft")
    assert list(read(tmp_path / "lora" / "rwkv_lora.pth")) == [
        f"blocks.{layer}.att.key.lora_{letter}" for layer in range(2) for letter in "AB"
    ]


def test_inspect_says_what_the_file_is_and_what_it_does_not_say(files: Files) -> None:
    said = succeeded("inspect", files.end).out
    assert "RWKV-PEFT's format" in said and "--alpha LORA_ALPHA" in said
    assert "rwkv6-blinkdl" in succeeded("inspect", files.base).out


def test_missing_options_are_asked_for(files: Files, tmp_path: Path) -> None:
    out, base = ["-o", tmp_path / "out"], ["--base", files.base]
    refused(
        "merge", files.end, *out, *base, words=["rwkv-0.pth", "does not store its scale", "--alpha", "--init"]
    )
    refused("to-lora", files.end, *out, words=["does not store its scale"])
    refused("merge", files.end, *out, "--alpha", 3, words=["base", "--base"])
    words = ["leave --alpha out"]
    refused("merge", files.end, *out, *base, "--alpha", 3, "--init", files.start, words=words)
    for scale in (["--alpha", 3], []):
        refused("merge", files.base, *out, *base, *scale, words=["base.pth holds no lora_A"])
    for file in (files.start, files.end):
        refused(
            "decompose",
            file,
            *out,
            words=[f"{file} has tensors of no known layout", "lora_A", "adapter to merge"],
        )
    tensors = read(files.end)
    tensors.popitem(last=False)
    torch.save(tensors, tmp_path / "half.pth")
    refused(
        "merge",
        tmp_path / "half.pth",
        *out,
        *base,
        "--alpha",
        3,
        words=["has no lora_A for blocks.0.att.key"],
    )


def test_an_adapter_of_another_family_is_not_written_in_this_format(
    checkpoint: object, tmp_path: Path
) -> None:
    llama = checkpoint("llama")  # type: ignore[operator]
    succeeded("decompose", llama, "-o", tmp_path / "out", "--rank", 4)
    command = ("to-lora", tmp_path / "out", "-o", tmp_path / "lora", "--format", "rwkv-peft")
    refused(*command, words=["model.layers.0", "RWKV-6 only"])
    refused("merge", tmp_path / "out", "-o", tmp_path / "m", "--alpha", 3, words=["stores its own alpha"])
