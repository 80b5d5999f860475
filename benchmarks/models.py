"""Llama-layout checkpoints of chosen sizes, with spectra like trained weights: a power law over a flat bulk.

python benchmarks/models.py OUT --size 300m
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "num_key_value_heads": 32,
}
SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 2000},
    "300m": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "vocab_size": 32000},
    "1b2": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    **{f"7b{layers}": _LLAMA_7B | {"num_hidden_layers": layers} for layers in (1, 2, 8)},
}
"""1b2 has two layers of a model of 1.1 billion parameters, 7b1, 7b2 and 7b8 that many of one of seven."""
HEADS = 32
GROUPS = 4


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="300m")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(ensure_model(arguments.out, arguments.size, device=arguments.device))


def ensure_model(out: Path, size: str, seed: int = 0, device: str = "cpu") -> Path:
    """The model at `out`, which is written if it does not exist. Its numbers depend on the device."""
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    values = SIZES[size]
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(values, generator)):
        shard = {name: tensor.cpu() for name, tensor in shard.items()}
        file = f"model-{number + 1:05}-of-{values['num_hidden_layers'] + 1:05}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    heads = HEADS if values["hidden_size"] >= 2048 else 8
    config = values | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("num_key_value_heads", GROUPS),
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def _shards(values: dict[str, int], generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Embedding, head and norm; then one shard per layer."""
    hidden = values["hidden_size"]
    wide = values["intermediate_size"]
    vocabulary = values["vocab_size"]
    groups = values.get("num_key_value_heads", GROUPS)
    narrow = hidden // (HEADS if hidden >= 2048 else 8) * groups
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden)}
    shapes |= {"self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    yield {
        "model.embed_tokens.weight": _bulk(vocabulary, hidden, generator).to(torch.bfloat16),
        "lm_head.weight": _bulk(vocabulary, hidden, generator).to(torch.bfloat16),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shard = {
            f"{prefix}{name}.weight": trained_matrix(*shape, generator) for name, shape in shapes.items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        yield shard


def _bulk(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device=generator.device) * 0.02


def trained_matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A flat bulk and, above it, singular values that fall as 1 / sqrt(k)."""
    rank = min(rows, columns, 512)
    device = generator.device
    sigma = 0.06 * (rows**0.5 + columns**0.5) * torch.arange(1, rank + 1, device=device).float().pow(-0.5)
    left = torch.randn(rows, rank, generator=generator, device=device) / rows**0.5
    right = torch.randn(rank, columns, generator=generator, device=device) / columns**0.5
    return torch.addmm(_bulk(rows, columns, generator), left * sigma, right).to(torch.bfloat16)


if __name__ == "__main__":
    main()
