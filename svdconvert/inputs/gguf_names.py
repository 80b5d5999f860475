"""The names and the order of rows that llama.cpp gives to the matrices that a LoRA adapts.

Source: llama.cpp, convert_lora_to_gguf.py and convert_hf_to_gguf.py; gguf 0.19, tensor_mapping.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from svdconvert.errors import ArtifactError
from svdconvert.layouts.base import Layout
from svdconvert.output.gguf_file import Metadata

FILE = "adapter.gguf"
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""model_type of config.json -> llama.cpp's architecture."""
_NAMES = {
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_HEADS = {"attn.q": "num_attention_heads", "attn.k": "num_key_value_heads"}
_MOST_HEADS = 1 << 16


@dataclass(frozen=True)
class GgufNames:
    """The tables for one base."""

    layout: Layout
    config: Mapping[str, Any]
    """The base's config.json."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name. Raises ArtifactError for a model whose names are not known."""
        kind = str(self.config.get("model_type"))
        if kind not in _ARCHITECTURES:
            raise ArtifactError(
                f"the base's model_type is {kind!r}, and the format gguf is known for "
                f"{', '.join(_ARCHITECTURES)}; write --format peft, and convert it with llama.cpp"
            )
        return _ARCHITECTURES[kind]

    def metadata(self, rank: int) -> Metadata:
        """What makes the file a LoRA of scale 1 for llama.cpp."""
        return (
            ("general.architecture", self.architecture),
            ("general.type", "adapter"),
            ("adapter.type", "lora"),
            ("adapter.lora.alpha", float(rank)),
        )

    def key(self, module: str, piece: str) -> str:
        """The name of a module's factor. Raises ArtifactError for a module that llama.cpp does not adapt."""
        slot = self.layout.slot(f"{module}.weight")
        if slot is None or slot.role not in _NAMES:
            raise ArtifactError(
                f"{module} has no name in GGUF that svdconvert knows; write --format peft, and convert "
                "it with llama.cpp"
            )
        return f"blk.{slot.layer}.{_NAMES[slot.role]}.weight.{piece.lower()}"

    def stored(self, module: str, piece: str, factor: Tensor) -> Tensor:
        """The factor as llama.cpp wants it: for its architecture llama, the rows of queries and keys move.

        The halves of each head, which transformers rotates together, become neighbours.
        """
        slot = self.layout.slot(f"{module}.weight")
        if piece != "lora_B" or self.architecture != "llama" or slot is None or slot.role not in _HEADS:
            return factor
        rows, rank = factor.shape
        heads = self._heads(_HEADS[slot.role])
        if rows % (2 * heads):
            raise ArtifactError(
                f"{module} has {rows} rows, which are no {heads} heads as the base's config.json says; give "
                "the adapter's own base with --base"
            )
        return (
            factor.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank).contiguous()
        )

    def _heads(self, name: str) -> int:
        known = self.config.get(name, self.config.get("num_attention_heads"))
        if isinstance(known, bool) or not isinstance(known, int) or not 1 <= known <= _MOST_HEADS:
            raise ArtifactError(f"the base's config.json has no usable {name}; restore it")
        return known
