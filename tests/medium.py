"""Checkpoints of a chosen size in the Llama layout, with power-law spectra, written without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def build(
    directory: Path,
    *,
    layers: int,
    hidden: int = 128,
    wide: int = 352,
    vocabulary: int = 512,
    seed: int | None = None,
) -> Path:
    """Write a checkpoint of `layers` layers in bfloat16, with one shard for every two layers."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(layers if seed is None else seed)
    shards: list[dict[str, Tensor]] = [{}]
    shards[0]["model.embed_tokens.weight"] = _matrix(vocabulary, hidden, generator)
    for layer in range(layers):
        if layer % 2 == 0:
            shards.append({})
        for name, (rows, columns) in _shapes(hidden, wide).items():
            shards[-1][f"model.layers.{layer}.{name}.weight"] = _matrix(rows, columns, generator)
    _write(directory, shards)
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocabulary, "tie_word_embeddings": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def _shapes(hidden: int, wide: int) -> dict[str, tuple[int, int]]:
    attention = {"q": hidden, "k": hidden // 2, "v": hidden // 2, "o": hidden}
    shapes = {f"self_attn.{part}_proj": (rows, hidden) for part, rows in attention.items()}
    return shapes | {
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }


def _matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    rank = min(rows, columns, 64)
    sigma = torch.arange(1, rank + 1).float().pow(-0.5)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    return ((left * sigma) @ right / rows**0.5 + 0.05 * noise).to(torch.bfloat16)


def _write(directory: Path, shards: list[dict[str, Tensor]]) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
