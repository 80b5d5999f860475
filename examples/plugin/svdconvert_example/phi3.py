"""Phi-3: q, k and v are one matrix, and so are gate and up."""

from svdconvert.layouts.base import Layout

_LAYER = "model.layers.{layer}"

LAYOUT = Layout(
    model_types=frozenset({"phi3"}),
    roles={
        "attn.qkv": f"{_LAYER}.self_attn.qkv_proj.weight",
        "attn.o": f"{_LAYER}.self_attn.o_proj.weight",
        "mlp.gate_up": f"{_LAYER}.mlp.gate_up_proj.weight",
        "mlp.down": f"{_LAYER}.mlp.down_proj.weight",
    },
    summary="Phi-3 and Phi-4 with q, k, v in one matrix",
)
