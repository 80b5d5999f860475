"""Checkpoints and adapters of image-text models under the names of transformers 4 and 5, and bare bodies."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdconvert import Run, SplitOptions, decompose, merge, read_manifest
from tests import vision
from tests.stock import tensors

RUN = Run(device="cpu", threads=1)
Rename = Callable[[str], str]

# Family -> (the names of transformers 5, those of transformers 4) from the names at run time.
SPELLINGS: dict[str, tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]] = {
    "llava": (
        (),
        (
            (r"^lm_head", "language_model.lm_head"),
            (r"^model\.language_model\.", "language_model.model."),
            (r"^model\.vision_tower\.", "vision_tower.vision_model."),
            (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
        ),
    ),
    "qwen2_5_vl": ((), ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))),
}


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in rules:
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return name


@pytest.mark.parametrize("family", SPELLINGS)
def test_both_spellings_have_the_same_matrices(family: str, tmp_path: Path) -> None:
    base = vision.build(family, tmp_path / "base")
    decompose(base, tmp_path / "start", SplitOptions(rank=4), RUN)
    matrices = read_manifest(tmp_path / "start").matrices
    stored = tensors(base)
    for version, rules in zip(("new", "old"), SPELLINGS[family], strict=True):
        copy = Path(shutil.copytree(base, tmp_path / version))
        names = runtime_names(family, stored)
        content = {renamed(names[name], rules): tensor for name, tensor in stored.items()}
        save_file(content, copy / "model.safetensors", metadata={"format": "pt"})
        decompose(copy, tmp_path / f"{version}-start", SplitOptions(rank=4), RUN)
        found = read_manifest(tmp_path / f"{version}-start").matrices
        assert {one.module for one in found.values()} == {one.module for one in matrices.values()}
        assert set(found) <= set(content)


def runtime_names(family: str, stored: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name in the files -> name at run time; the files have the names of transformers 4."""
    back = {
        "llava": (
            (r"^language_model\.lm_head", "lm_head"),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^vision_tower\.(vision_model\.)?", "model.vision_tower."),
            (r"^multi_modal_projector\.", "model.multi_modal_projector."),
        ),
        "qwen2_5_vl": ((r"^visual\.", "model.visual."), (r"^model\.(?!visual)", "model.language_model.")),
    }[family]
    return {name: renamed(name, back) for name in stored}


ADAPTER_NAMES = {
    "llava": ("model.language_model.layers.1", "language_model.model.layers.1", "model.layers.1", "layers.1"),
    "qwen2_5_vl": ("model.language_model.layers.1", "model.layers.1", "language_model.layers.1"),
}
CASES = [(family, name) for family, names in ADAPTER_NAMES.items() for name in names]


@pytest.mark.parametrize(("family", "layer"), CASES)
def test_an_adapter_has_the_names_of_either_version(family: str, layer: str, tmp_path: Path) -> None:
    base = vision.build(family, tmp_path / "base")
    torch.manual_seed(0)
    key = f"base_model.model.{layer}.mlp.up_proj"
    factors = {f"{key}.lora_A.weight": torch.randn(2, 32), f"{key}.lora_B.weight": torch.randn(44, 2)}
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["up_proj"],
        "task_type": "CAUSAL_LM",
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merge(tmp_path / "adapter", tmp_path / "merged", run=RUN, base=str(base))
    before = tensors(base)
    after = tensors(tmp_path / "merged")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 1 and changed[0].endswith("layers.1.mlp.up_proj.weight")
    wanted = before[changed[0]] + factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
    torch.testing.assert_close(after[changed[0]], wanted)
