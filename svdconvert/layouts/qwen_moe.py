"""Qwen3-MoE: each expert's matrices are separate tensors, or stacked; the router is not adapted."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import gated_decoder
from svdconvert.layouts.experts import Experts

_EXPERTS = "model.layers.{layer}.mlp.experts"

LAYOUT = Layout(
    model_types=frozenset({"qwen3_moe"}),
    # Some layers may be dense, with the names of an ordinary decoder.
    roles=gated_decoder()
    | {
        "experts.gate": f"{_EXPERTS}.{{expert}}.gate_proj.weight",
        "experts.up": f"{_EXPERTS}.{{expert}}.up_proj.weight",
        "experts.gate_up": f"{_EXPERTS}.gate_up_proj[{{expert}}]",
        "experts.down": (f"{_EXPERTS}.{{expert}}.down_proj.weight", f"{_EXPERTS}.down_proj[{{expert}}]"),
    },
    experts=Experts(
        parameters={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
        fused_by_peft=True,
    ),
    prefix="model.",
    summary="Qwen3 mixtures of experts, expert by expert",
)
