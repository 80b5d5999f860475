"""Mixtral: experts w1 (gate), w3 (up), w2 (down), each a separate tensor; the router is not adapted."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import attention

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"

LAYOUT = Layout(
    model_types=frozenset({"mixtral"}),
    roles=attention()
    | {
        "experts.gate": f"{_EXPERT}.w1.weight",
        "experts.up": f"{_EXPERT}.w3.weight",
        "experts.down": f"{_EXPERT}.w2.weight",
    },
    prefix="model.",
    summary="Mixtral, expert by expert",
)
