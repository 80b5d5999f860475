"""RWKV-6 as flash-linear-attention names it; the five inputs of the mixing are in the order r, w, k, v, g.

Source: github.com/fla-org/flash-linear-attention, fla/models/rwkv6 and utils/convert_from_rwkv6.py.
C: width, D: rank of the mixing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.rename_rules import RenameRule
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.layouts.base import KnownUnsupported, Layout, LayoutFamily
from svdconvert.models.rwkv6_tensors import (
    BLOCK,
    GROUPS,
    MIX_ORDER,
    ROLES,
    Sizes,
    network_path,
    rename,
    states,
)

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = "model.layers.{layer}"
_ATT = f"{_LAYER}.attn"
_CANONICAL_ATT = f"{BLOCK}.att"
_FFN = f"{_LAYER}.ffn"
_CANONICAL_FFN = f"{BLOCK}.ffn"
_ORDER = ("r", "w", "k", "v", "g")
_THERE = [MIX_ORDER.index(letter) for letter in _ORDER]
_BACK = [_ORDER.index(letter) for letter in MIX_ORDER]


def _in_five(tensor: "Tensor") -> "Tensor":
    """(C, 5 D) -> (C, 5, D)."""
    return tensor.reshape(tensor.shape[0], 5, -1)


def _to_layout_w1(tensors: "Sequence[Tensor]") -> "Tensor":
    """(C, 5 D) -> (5 D, C)."""
    return _in_five(tensors[0])[:, _THERE].flatten(1).mT


def _to_canonical_w1(tensor: "Tensor") -> "Sequence[Tensor]":
    return [_in_five(tensor.mT)[:, _BACK].flatten(1)]


def _to_layout_w2(tensors: "Sequence[Tensor]") -> "Tensor":
    """(5, D, C) -> (C, 5 D)."""
    return tensors[0][_THERE].permute(2, 0, 1).flatten(1)


def _to_canonical_w2(tensor: "Tensor") -> "Sequence[Tensor]":
    return [_in_five(tensor)[:, _BACK].permute(1, 2, 0)]


def _to_layout_biases(tensors: "Sequence[Tensor]") -> "Tensor":
    """Five of (1, 1, C) -> (5, C)."""
    import torch

    return torch.cat([tensor.reshape(1, -1) for tensor in tensors])


def _to_canonical_biases(tensor: "Tensor") -> "Sequence[Tensor]":
    return [row.reshape(1, 1, -1) for row in tensor]


def _vector(canonical: str, name: str) -> RenameRule:
    """(1, 1, C) -> (C,)."""
    return RenameRule(
        (canonical,), name, lambda tensors: tensors[0].flatten(), rename(canonical, name).to_canonical
    )


def _transposed(canonical: str, name: str) -> RenameRule:
    return RenameRule((canonical,), name, lambda tensors: tensors[0].mT, lambda tensor: [tensor.mT])


def _pair(canonical: str, name: str) -> list[RenameRule]:
    """A norm's weight and bias."""
    return [rename(f"{canonical}.{part}", f"{name}.{part}") for part in ("weight", "bias")]


_MATRICES = {
    "att.receptance": f"{_ATT}.r_proj.linear.weight",
    "att.key": f"{_ATT}.k_proj.linear.weight",
    "att.value": f"{_ATT}.v_proj.linear.weight",
    "att.gate": f"{_ATT}.g_proj.linear.weight",
    "att.output": f"{_ATT}.o_proj.weight",
    "ffn.key": f"{_FFN}.key.linear.weight",
    "ffn.receptance": f"{_FFN}.receptance.linear.weight",
    "ffn.value": f"{_FFN}.value.weight",
}
_RULES = (
    rename("emb.weight", "model.embeddings.weight"),
    *_pair(f"{BLOCK}.ln0", f"{_LAYER}.pre_norm"),
    *_pair(f"{BLOCK}.ln1", f"{_LAYER}.attn_norm"),
    *_pair(f"{BLOCK}.ln2", f"{_LAYER}.ffn_norm"),
    _vector(f"{_CANONICAL_ATT}.time_maa_x", f"{_ATT}.x_proj.0.mu"),
    RenameRule(
        (f"{_CANONICAL_ATT}.time_maa_w1",), f"{_ATT}.x_proj.0.linear.weight", _to_layout_w1, _to_canonical_w1
    ),
    RenameRule(
        (f"{_CANONICAL_ATT}.time_maa_w2",), f"{_ATT}.x_proj.2.weight", _to_layout_w2, _to_canonical_w2
    ),
    RenameRule(
        tuple(f"{_CANONICAL_ATT}.time_maa_{letter}" for letter in _ORDER),
        f"{_ATT}.x_bias",
        _to_layout_biases,
        _to_canonical_biases,
    ),
    _transposed(f"{_CANONICAL_ATT}.time_decay_w1", f"{_ATT}.w_proj.linear.lora.0.weight"),
    _transposed(f"{_CANONICAL_ATT}.time_decay_w2", f"{_ATT}.w_proj.linear.lora.2.weight"),
    _vector(f"{_CANONICAL_ATT}.time_decay", f"{_ATT}.w_proj.linear.lora.2.bias"),
    rename(f"{_CANONICAL_ATT}.time_faaaa", f"{_ATT}.bonus"),
    *(rename(f"{BLOCK}.{role}.weight", _MATRICES[role]) for role in ROLES),
    *_pair(f"{_CANONICAL_ATT}.ln_x", f"{_ATT}.g_norm"),
    _vector(f"{_CANONICAL_FFN}.time_maa_k", f"{_FFN}.key.mu"),
    _vector(f"{_CANONICAL_FFN}.time_maa_r", f"{_FFN}.receptance.mu"),
    *_pair("ln_out", "model.norm"),
    rename("head.weight", "lm_head.weight"),
)


def config(family: TensorSource) -> dict[str, Any]:
    """config.json as flash-linear-attention's converter writes it, plus what its defaults get wrong."""
    sizes = Sizes.of(family.infos)
    return {
        "architectures": ["RWKV6ForCausalLM"],
        "attn_mode": "chunk",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "gate_low_rank_dim": sizes.decay_rank,
        "hidden_act": "sqrelu",
        "hidden_ratio": 3.5,
        "hidden_size": sizes.width,
        # If null, it would be rounded up to a multiple of 32, and RWKV rounds down.
        "intermediate_size": sizes.feed_forward,
        "model_type": "rwkv6",
        "norm_bias": True,
        "norm_eps": 1e-5,
        "norm_first": True,
        "num_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "proj_low_rank_dim": sizes.mix_rank,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": sizes.vocabulary,
    }


LAYOUT = Layout(
    model_types=frozenset(),
    roles=_MATRICES,
    summary="RWKV-6 as flash-linear-attention names it",
    signature_tensor=f"{_ATT}.x_proj.0.linear.weight".replace("{layer}", "0"),
    known_unsupported=(KnownUnsupported("an RWKV-7", ("model.layers.0.attn.r_k",)),),
    family=LayoutFamily(
        "rwkv6",
        network_path,
        _RULES,
        states=states,
        groups=GROUPS,
        config=config,
        loading='fla.models.RWKV6ForCausalLM.from_pretrained("{path}")',
        advice="the group norm of RWKV-6 has the epsilon 64e-5, for which this layout's config.json has no "
        "key: flash-linear-attention loads the model with 1e-5, and its logits differ, those of a trained "
        "model by up to 0.5. After loading, set the eps of every layer's attn.g_norm to 64e-5",
    ),
)
