"""Tiny random checkpoints for every layout.

Two layers, grouped queries, rectangular matrices, decaying spectra. Made by stock transformers, so that
their names on disk are those of real models of the family.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SiglipVisionConfig,
    XLMRobertaConfig,
)

from svdconvert.inputs.model import open_model
from svdconvert.layouts.base import LAYOUTS, Layout

VOCABULARY = 61
HIDDEN = 32
ONE_FILE = "5GB"
SHARDED = "8KB"

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _gemma3(**values: Any) -> Gemma3Config:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return Gemma3Config(
        text_config=Gemma3TextConfig(**values, sliding_window=16),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=58,
        boi_token_index=59,
        eoi_token_index=60,
        tie_word_embeddings=values.get("tie_word_embeddings", True),
    )


def _mixtral(**values: Any) -> MixtralConfig:
    return MixtralConfig(**values, num_local_experts=3, num_experts_per_tok=2)


def _qwen3_moe(**values: Any) -> Qwen3MoeConfig:
    """The second layer is dense: both kinds of names lie in one checkpoint."""
    return Qwen3MoeConfig(
        **values, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20, mlp_only_layers=[1]
    )


CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": _mixtral,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "gemma3": _gemma3,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": _qwen3_moe,
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "xlm-roberta": XLMRobertaConfig,
}
"""model_type -> the configuration of a tiny model of it, if transformers' own class does not suffice."""

_FOUND = ("gemma3",)
"""Model types without a layout of their own: the layout is found from the network."""
_OWN = {kind: LAYOUTS.get(name) for name in LAYOUTS.names() for kind in LAYOUTS.get(name).model_types}
MODEL_TYPES = sorted([*_OWN, *_FOUND])
MIXTURES = frozenset(kind for kind, layout in _OWN.items() if layout.experts is not None)
PEFT_MODEL_TYPES = sorted([*(kind for kind in _OWN if kind not in MIXTURES), *_FOUND])
"""Those without mixtures of experts."""
CAUSAL = [kind for kind in MODEL_TYPES if kind in _FOUND or _OWN[kind].task == "CAUSAL_LM"]
"""Those that are no encoders."""


def layout_of(directory: Path) -> Layout:
    """The layout of a checkpoint."""
    return open_model(str(directory)).layout()[1]


def configuration(model_type: str, **values: Any) -> PretrainedConfig:
    """The configuration of a tiny model: from CONFIGS, else of transformers' own class for the type."""
    if model_type in CONFIGS:
        return CONFIGS[model_type](**values)
    return AutoConfig.for_model(model_type, **values)


def build(  # noqa: PLR0913 (one parameter for each way in which a checkpoint may differ)
    model_type: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = ONE_FILE,
    tied: bool | None = None,
    pickled: bool = False,
) -> Path:
    """Write a tiny checkpoint of `model_type` into `directory` and return it.

    `tied` is as the family does it unless given; `pickled` writes pytorch_model.bin instead.
    """
    values = TEXT if tied is None else TEXT | {"tie_word_embeddings": tied}
    config = configuration(model_type, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(model_type.encode()))
        model = AutoModelForCausalLM.from_config(config)
        fill(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    if pickled:
        _pickle(directory)
    return directory


def fill(model: PreTrainedModel) -> None:
    """Random values everywhere: no norm is one and no bias zero, so that nothing lost goes unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(decaying(*parameter.shape))
                parameter[::5, ::7] = -0.0
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def decaying(rows: int, columns: int) -> Tensor:
    """A random matrix with singular values 2 / k: what is left out at a low rank matters."""
    count = min(rows, columns)
    wide = max(count, 1024)  # of a long matrix's square one, this many columns are enough
    left, right = torch.randn(rows, min(rows, wide)), torch.randn(columns, min(columns, wide))
    sigma = 2.0 / torch.arange(1, count + 1)
    if columns > wide:
        return torch.linalg.qr(left).Q[:, :count] * sigma @ torch.linalg.qr(right).Q[:, :count].T
    return torch.linalg.qr(left).Q[:, :count] * sigma @ torch.linalg.qr(right).Q[:count]


def _pickle(directory: Path) -> None:
    """Turn the safetensors files of `directory` into the .bin files that came before them."""
    for file in sorted(directory.glob("*.safetensors")):
        torch.save(load_file(file), directory / _pickled_name(file.name))
        file.unlink()
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {name: _pickled_name(file) for name, file in content["weight_map"].items()}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


def _pickled_name(file: str) -> str:
    return "pytorch_" + file.replace(".safetensors", ".bin")
