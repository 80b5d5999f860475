"""Qwen2 (biased q, k, v) and Qwen3 (normed q, k); biases and norms leave as they are."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import gated_decoder

LAYOUT = Layout(
    model_types=frozenset({"qwen2", "qwen3"}),
    roles=gated_decoder(),
    summary="Qwen2, Qwen2.5 and dense Qwen3 models",
)
