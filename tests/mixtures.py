"""Tiny mixtures of experts, stored as transformers saves them, or with the experts of a layer stacked."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.families.check import make

SPECIAL = ("mixtral", "qwen3_moe")
"""Families of `tests.tiny`; the second one has a dense layer too."""
FAMILIES = (
    "mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek_v3", "olmoe", "gpt_oss", "llama4_text",
    "granitemoe", "qwen3_next", "qwen3_5_moe_text",
)  # fmt: skip


def mixture(family: str, directory: Path, *, stacked: bool = False) -> Path:
    """Write a tiny float32 model of the family into `directory` and return that."""
    if family in SPECIAL:
        tiny.build(family, directory, dtype=torch.float32)
    else:
        make(family, "causal", directory)
    if stacked:
        model = AutoModelForCausalLM.from_pretrained(directory)
        for file in directory.glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(directory, save_original_format=False)
    return directory
