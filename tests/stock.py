"""How stock transformers and PEFT load a directory, and an adapter as training elsewhere leaves it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from svdconvert.manifest.schema import read_manifest
from svdconvert.methods.base import METHODS, init_folder
from tests.tiny import VOCABULARY

WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.arange(3, 3 + 24).reshape(2, 12) % (VOCABULARY - 4)


def plain(directory: Path) -> PreTrainedModel:
    """The model as transformers loads it without options."""
    return AutoModelForCausalLM.from_pretrained(directory)


def adapted(base: Path, adapter: Path, *, subfolder: str | None = None, trainable: bool = False) -> PeftModel:
    """`base` with an adapter, as PEFT loads it."""
    return PeftModel.from_pretrained(plain(base), adapter, subfolder=subfolder, is_trainable=trainable)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits.float()


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a directory, read with the safetensors library."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same_bytes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """True if names, dtypes, shapes and bits are the same: the sign of a zero counts."""
    return found.keys() == wanted.keys() and all(same_bits(found[name], wanted[name]) for name in wanted)


def same_bits(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def start_of(decomposed: Path) -> Path:
    """The initial adapter of a DECOMPOSED directory."""
    return decomposed / init_folder(read_manifest(decomposed).method)


def trained_from(decomposed: Path, out: Path, amount: float = 0.05) -> Path:
    """An adapter as if trained from the initial one of `decomposed`: every trained factor has changed."""
    trained = METHODS.get(read_manifest(decomposed).method).trains
    shutil.copytree(start_of(decomposed), out)
    noise = torch.Generator().manual_seed(7)
    factors = load_file(out / WEIGHTS)
    for name, factor in factors.items():
        if name.split(".")[-2] in trained:
            factor += amount * torch.randn(factor.shape, generator=noise)
    save_file(factors, out / WEIGHTS, metadata={"format": "pt"})
    return out
