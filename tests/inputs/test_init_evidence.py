"""How an adapter started is found by files or asked of the weights; an ordinary LoRA needs no option."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from svdconvert import Run, SplitOptions, decompose, merge, to_lora
from svdconvert.adapters.adapter_config import CONFIG
from tests.conftest import Build
from tests.program import refused
from tests.stock import tensors

RUN = Run(device="cpu")
SLICES = ("pissa", "milora", "olora")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def without_marks(directory: Path, out: Path) -> Path:
    """An adapter as another program would have saved it: alone, with nothing of svdconvert in it."""
    shutil.copytree(directory, out)
    path = out / CONFIG
    values = json.loads(path.read_text())
    values.pop("auto_mapping", None)
    path.write_text(json.dumps(values))
    return out


@pytest.mark.parametrize("method", SLICES)
def test_a_slice_of_the_base_is_not_merged_into_it_twice(
    method: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    decompose(base, tmp_path / "split", SplitOptions(method=method, rank=8), RUN)
    adapter = without_marks(tmp_path / "split" / f"{method}_init", tmp_path / "elsewhere")
    for command in ("merge", "to-lora"):
        words = [command, adapter, "-o", tmp_path / "out", "--base", base]
        refused(*words, words=["contains a part of", "--residual", "--init none"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", SLICES)
def test_the_mark_in_the_configuration_says_it_without_the_base(
    method: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    decompose(base, tmp_path / "split", SplitOptions(method=method, rank=8), RUN)
    adapter = Path(shutil.copytree(tmp_path / "split" / f"{method}_init", tmp_path / "elsewhere"))
    refused("to-lora", adapter, "-o", tmp_path / "out", words=["its initial state is unknown"])


def test_the_initial_adapter_itself_is_merged_as_untrained(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama")
    decompose(base, tmp_path / "split", SplitOptions(rank=4), RUN)
    merge(tmp_path / "split" / "pissa_init", tmp_path / "merged", run=RUN, base=str(base))
    wanted = tensors(base)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(tmp_path / "merged").items())


@pytest.mark.parametrize("seed", range(10))
def test_an_ordinary_lora_passes_without_any_option(seed: int, checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint(["llama", "qwen2", "gemma"][seed % 3], dtype=torch.float32)
    torch.manual_seed(seed)
    rank = [1, 2, 8][seed % 3]
    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    size = [1e-5, 1e-3, 1e-1][seed // 3 % 3]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    model.save_pretrained(tmp_path / "lora")
    merge(tmp_path / "lora", tmp_path / "merged", run=RUN, base=str(base))
    to_lora(tmp_path / "lora", tmp_path / "out", run=RUN, base=str(base))
