"""Mixtral: experts w1 (gate), w3 (up), w2 (down), by themselves or stacked; the router is not adapted."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import attention
from svdconvert.layouts.experts import Experts

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
_STACKED = "model.layers.{layer}.mlp.experts"

LAYOUT = Layout(
    model_types=frozenset({"mixtral"}),
    roles=attention()
    | {
        "experts.gate": f"{_EXPERT}.w1.weight",
        "experts.up": f"{_EXPERT}.w3.weight",
        "experts.gate_up": f"{_STACKED}.gate_up_proj[{{expert}}]",
        "experts.down": (f"{_EXPERT}.w2.weight", f"{_STACKED}.down_proj[{{expert}}]"),
    },
    experts=Experts(
        parameters={"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
        renamed=("block_sparse_moe", "mlp"),
        fused_by_peft=True,
    ),
    prefix="model.",
    summary="Mixtral, expert by expert",
)
