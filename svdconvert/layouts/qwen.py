"""Qwen2 (q, k, v with biases) and Qwen3 (q, k with norms); biases and norms are left as they are."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import gated_decoder

LAYOUT = Layout(
    model_types=frozenset({"qwen2", "qwen3"}),
    roles=gated_decoder(),
    prefix="model.",
    summary="Qwen2, Qwen2.5 and dense Qwen3 models",
)
