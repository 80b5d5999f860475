"""GGUF, the files of llama.cpp: decoded by the library `gguf`, under the names that transformers has.

llama.cpp renames all tensors, reorders the rows of the queries and keys of Llama models (it rotates pairs of
neighbours instead of two halves), and adds 1 to the norms of Gemma.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.gguf_file import GgufFile, GgufTensor
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.errors import CheckpointError, brief
from svdconvert.quantization.base import Coded, Parts, StorageFormat

_DENSE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA2 = _DENSE | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": _DENSE
    | {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    },
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "qwen3moe": _DENSE
    | {
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
        "ffn_down_exps": "mlp.experts.{expert}.down_proj",
        "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    },
    "gemma": _DENSE,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
}
"""general.architecture -> llama.cpp's name of a module -> that of transformers, after the layer's prefix."""
_IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_TENSOR = re.compile(r"(?:blk\.([0-9]{1,6})\.)?(\w+)\.(weight|bias)")
_PERMUTED = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
_BITS = re.compile(r"(?:I?Q|TQ|MXFP|NVFP|BF|F)([0-9]+)")


class Gguf(StorageFormat):
    """Blocks of codes of any of llama.cpp's types."""

    summary = "GGUF: llama.cpp's files"
    methods = frozenset({"gguf"})

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Every tensor of a GGUF file, those of floats too, which are rounded to one element type.

        Raises CheckpointError for an architecture or a tensor that is not known.
        """
        if not isinstance(source, GgufFile):
            return
        architecture = source.metadata.get("general.architecture")
        names = _NAMES.get(architecture) if isinstance(architecture, str) else None
        if names is None:
            raise CheckpointError(
                f"{source.path} is a model of the architecture {brief(architecture)}, whose tensors have no "
                f"known names in transformers (known: {', '.join(_NAMES)}); convert it with its own tools"
            )
        for stored, tensor in source.tensors.items():
            if tensor.name not in _IGNORED:
                yield _coded(source, stored, tensor, names)

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """The values of `gguf.quants.dequantize`, with the rows and norms that transformers expects."""
        codes = parts["codes"]
        heads = coded.settings["heads"]
        taken = codes[_rows_of_halves(rows, coded.shape[0], heads)] if heads else codes[rows]
        values = _values(taken, coded.settings["type"])
        return values - 1.0 if coded.settings["offset"] else values

    def title(self, coded: Coded) -> str:
        """ggml's name of the type."""
        return f"GGUF {coded.settings['type']}"


def _coded(source: GgufFile, stored: str, tensor: GgufTensor, names: Mapping[str, str]) -> Coded:
    architecture = str(source.metadata["general.architecture"])
    match = _TENSOR.fullmatch(tensor.name)
    if match is None or match[2] not in names:
        raise CheckpointError(
            f"{source.path} holds {tensor.name}, which is no tensor of a {architecture} that is known; "
            "convert it with its own tools"
        )
    layer, module, kind = match.groups()
    path = names[module].replace("{expert}", str(tensor.expert))
    name = f"model.layers.{layer}.{path}.{kind}" if layer else f"{path}.{kind}"
    heads = 0
    if architecture == "llama" and module in _PERMUTED:
        heads = _heads(source, f"{architecture}.{_PERMUTED[module]}", tensor)
    bits = _BITS.match(tensor.type)
    settings = {
        "type": tensor.type,
        "heads": heads,
        "offset": architecture.startswith("gemma") and "norm" in module,
    }
    return Coded(name, tensor.shape, {"codes": stored}, int(bits[1]) if bits else 8, settings=settings)


def _heads(source: GgufFile, key: str, tensor: GgufTensor) -> int:
    """The number of heads. Raises CheckpointError if they do not divide the rows into pairs."""
    heads = source.metadata.get(key)
    if type(heads) is not int or heads < 1 or tensor.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{source.path} has {brief(heads)} as {key}, which does not divide the rows of {tensor.name}, "
            f"{tensor.shape[0]}; fetch the file again"
        )
    return heads


def _rows_of_halves(rows: slice, count: int, heads: int) -> Tensor:
    """Which stored rows are those of transformers: of each head, the even ones first, then the odd ones."""
    order = torch.arange(count).reshape(heads, count // heads // 2, 2)
    return order.transpose(1, 2).reshape(-1)[rows]


def _values(codes: Tensor, type_name: str) -> Tensor:
    if codes.dtype != torch.uint8:
        return codes.float()
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        return torch.from_numpy(dequantize(codes.numpy(), GGMLQuantizationType[type_name]))
    except NotImplementedError as error:
        raise CheckpointError(
            f"the library gguf does not decode the type {type_name}; install a newer one, or convert the "
            "file to another type"
        ) from error


FORMAT = Gguf()
