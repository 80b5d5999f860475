"""Qwen3-MoE: each expert's matrices are separate tensors; the router is not adapted."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import gated_decoder

_EXPERT = "model.layers.{layer}.mlp.experts.{expert}"

LAYOUT = Layout(
    model_types=frozenset({"qwen3_moe"}),
    # Some layers may be dense, with the names of an ordinary decoder.
    roles=gated_decoder()
    | {f"experts.{part}": f"{_EXPERT}.{part}_proj.weight" for part in ("gate", "up", "down")},
    prefix="model.",
    summary="Qwen3 mixtures of experts, expert by expert",
)
