"""A LoRA that names its base loads by that name, and a push never publishes a directory of this machine."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from svdconvert import LoraOptions, PushOptions, SplitOptions, decompose, to_lora
from svdconvert.commands.push import plan_push
from svdconvert.manifest.schema import read_manifest
from svdconvert.publish.files import SourceRepos, collect_files
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.program import refused
from tests.stock import trained_from
from tests.visitor import Visitor


@pytest.fixture
def trained(checkpoint: Build, tmp_path: Path) -> Path:
    model = checkpoint("llama", dtype=torch.float32)
    decompose(model, tmp_path / "split", SplitOptions(rank=4))
    return trained_from(tmp_path / "split", tmp_path / "trained")


def named(directory: Path) -> object:
    return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_the_name_that_was_given_is_written_and_loaded(
    trained: Path, checkpoint: Build, tmp_path: Path
) -> None:
    model = str(checkpoint("llama", dtype=torch.float32))
    residual = str(tmp_path / "split")
    to_lora(trained, tmp_path / "lora", LoraOptions(base_name=model), residual=residual)
    assert named(tmp_path / "lora") == model
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "lora")
    ids = torch.arange(8)[None]
    assert torch.equal(found(ids).logits, expected(ids).logits)


FROM_THE_HUB = """
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from svdconvert import LoraOptions, SplitOptions, decompose, to_lora
from pathlib import Path
from tests.stock import trained_from
decompose("org/base", "split", SplitOptions(rank=4))
lora = to_lora(trained_from(Path("split"), Path("trained")), "lora", residual="split")
found = AutoPeftModelForCausalLM.from_pretrained("lora")
expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "lora")
ids = torch.arange(8)[None]
name = found.peft_config["default"].base_model_name_or_path
result = [name, torch.equal(found(ids).logits, expected(ids).logits)]
"""


@pytest.mark.processes
@pytest.mark.slow
def test_the_lora_of_a_base_of_the_hub_loads_by_its_own_directory(
    hub: Hub, alice: Visitor, checkpoint: Build
) -> None:
    hub.create("org/base", checkpoint("llama", dtype=torch.float32))
    assert alice.runs(FROM_THE_HUB) == ["org/base", True]


@pytest.mark.parametrize("name", ["org/base", None])
def test_a_name_of_the_hub_is_published_and_a_path_is_not(
    name: str | None, trained: Path, checkpoint: Build, tmp_path: Path
) -> None:
    given = name or str(checkpoint("llama", dtype=torch.float32))
    lora = tmp_path / "lora"
    to_lora(trained, lora, LoraOptions(base_name=given), residual=str(tmp_path / "split"))
    sent = collect_files(lora, read_manifest(lora), "me/lora", SourceRepos(None, None)).files
    config = sent["adapter_config.json"]
    assert isinstance(config, bytes)
    assert json.loads(config)["base_model_name_or_path"] == name
    assert plan_push(lora, "me/lora", PushOptions()).lacks_base


def test_a_format_without_a_name_of_the_base_refuses_one(trained: Path, tmp_path: Path) -> None:
    words = ["to-lora", trained, "-o", tmp_path / "out", "--residual", tmp_path / "split"]
    refused(*words, "--format", "mlx", "--base-name", "org/base", words=["--base-name changes nothing"])
